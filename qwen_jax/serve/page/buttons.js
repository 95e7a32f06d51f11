// Buttons, and what lies on the clipboard.

import { t } from "./words.js";

// Returns a button; its label is shown beside its icon, or only told where `bare`.
export function button(label, act, { icon = null, bare = false, className = "" } = {}) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = className;
  if (icon) made.append(iconOf(icon));
  if (bare) {
    made.title = label;
    made.setAttribute("aria-label", label);
  } else {
    const text = document.createElement("span");
    text.textContent = label;
    made.append(text);
  }
  made.addEventListener("click", () => act(made));
  return made;
}

// Returns one of the icons that index.html defines.
function iconOf(name) {
  const holder = document.createElement("template");
  holder.innerHTML = `<svg aria-hidden="true"><use href="#i-${name}"></use></svg>`;
  return holder.content.firstChild;
}

// Returns a button that copies a text, and says so for a moment.
export function copyButton(text, label = t("copy")) {
  return button(
    label,
    async (made) => {
      const shown = made.querySelector("span");
      shown.textContent = t((await copy(text())) ? "copied" : "notCopied");
      setTimeout(() => (shown.textContent = label), 2000);
    },
    { icon: "copy", className: "small" },
  );
}

// Browsers give pages the clipboard on this machine and by https only; elsewhere the older way is left.
async function copy(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
  }
  const before = document.activeElement;
  const field = document.createElement("textarea");
  field.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  before?.focus();
  return done;
}
