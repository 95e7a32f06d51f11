// How one message looks: its text, calls, figures and buttons.

import { button, copyButton } from "./buttons.js";
import { composing } from "./keys.js";
import { codeFrame, Rendered } from "./markdown.js";
import { longest } from "./settings.js";
import { t } from "./words.js";

const LEAST_PAUSE = 60; // milliseconds between two drawings of a reply that is written
const SHARE = 4; // of the time may go to drawing: a quarter
const MOST_SPOKEN = 2000; // characters of a reply that a screen reader is given at once

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// A message in the page. `actions` has what its buttons do: edit(message, text), again(message),
// continue(message); `name` is the called function's, for a tool's result.
export class MessageView {
  constructor(message, { actions, name = "" }) {
    this.message = message;
    this.actions = actions;
    this.element = element("article", `message ${message.role}`);
    const who = { user: t("you"), tool: t("resultOf", name), assistant: "" }[message.role];
    this.who = element("h2", "who", who);
    this.body = element("div", "body");
    this.calls = element("div", "calls");
    this.note = element("p", "note");
    this.figures = element("p", "figures");
    this.buttons = element("div", "buttons");
    this.rendered = message.role === "assistant" ? new Rendered(this.body) : null;
    const more = this.rendered ? [this.calls, this.note, this.figures] : [];
    this.element.append(this.who, this.body, ...more, this.buttons);
    if (message.role === "tool") this.body.tabIndex = 0; // so that the keyboard can move it
    this.pause = LEAST_PAUSE;
    this.timer = null;
  }

  // Shows what has come of a reply that is written, soon. Long ones are drawn less often.
  soon(after) {
    this.timer ??= setTimeout(() => {
      this.timer = null;
      const began = performance.now();
      this.draw({ writing: true });
      this.pause = Math.max(LEAST_PAUSE, (performance.now() - began) * SHARE);
      after();
    }, this.pause);
  }

  // Shows the message; `last` where it can be continued or written again.
  draw({ writing = false, last = false } = {}) {
    clearTimeout(this.timer);
    this.timer = null;
    const { message } = this;
    this.element.setAttribute("aria-busy", String(writing));
    this.element.classList.toggle("writing", writing);
    if (!this.rendered) {
      this.body.dir = "auto";
      this.body.textContent = message.content;
    } else {
      this.who.textContent = message.about.model || t("reply");
      this.rendered.update(message.content, !writing);
      this.drawCalls();
      this.note.textContent = writing ? "" : this.noteText();
      this.figures.textContent = this.figuresText(last && !writing);
    }
    if (writing) this.buttonsState = null;
    else this.drawButtons(last);
  }

  drawCalls() {
    const calls = this.message.tool_calls ?? [];
    const frames = calls.map(({ function: { name, arguments: text } }) => {
      const frame = element("section", "call");
      const heading = element("h3", "", t("calls", name));
      frame.append(heading, codeFrame(pretty(text), "json", t("arguments")));
      return frame;
    });
    this.calls.replaceChildren(...frames);
  }

  noteText() {
    const notes = { stopped: "stopped", length: "cut", broken: "broken", "": "interrupted" };
    const name = notes[this.message.about.finish];
    return name ? t(name) : "";
  }

  figuresText(withRoom) {
    const { tokens, rate, first, prompt, cached, context } = this.message.about.figures;
    if (!tokens) return "";
    const parts = [t("tokens", tokens)];
    if (rate) parts.push(t("rate", rate.toFixed(rate < 100 ? 1 : 0)));
    if (first) parts.push(t("first", first.toFixed(2)));
    if (prompt) parts.push(cached ? t("promptCached", prompt, cached) : t("prompt", prompt));
    if (withRoom && context && longest()) parts.push(t("room", context, longest()));
    return parts.join(" · ");
  }

  drawButtons(last) {
    const { message, actions } = this;
    const state = `${last} ${message.about?.finish}`;
    if (state === this.buttonsState) return; // one of them may have the focus
    this.buttonsState = state;
    const made = [copyButton(() => message.content)];
    const small = { className: "small" };
    made.push(button(t("edit"), () => this.edit(), { icon: "edit", ...small }));
    if (last && message.role === "assistant") {
      made.push(button(t("again"), () => actions.again(message), { icon: "again", ...small }));
      const unfinished = ["stopped", "length", "broken", ""].includes(message.about.finish);
      if (unfinished && message.content && !message.tool_calls) {
        made.push(button(t("continue"), () => actions.continue(message), small));
      }
    }
    this.buttons.replaceChildren(...made);
  }

  // Turns the text into a field. Escape or Cancel leaves it as it was.
  edit() {
    const { message, actions } = this;
    const asks = message.role !== "assistant";
    const form = element("form", "edit");
    const field = textField(t("edit"), message.content);
    const close = () => {
      form.replaceWith(this.body);
      this.buttons.hidden = false;
      this.buttons.querySelectorAll("button")[1]?.focus();
    };
    const save = () => {
      close();
      if (field.value !== message.content || asks) actions.edit(message, field.value);
    };
    form.append(field);
    if (asks) form.append(element("p", "note", t("editNote")));
    const row = element("div", "row");
    row.append(
      button(t(asks ? "saveAndAsk" : "save"), save, { className: "main" }),
      button(t("cancel"), close),
    );
    form.append(row);
    form.addEventListener("keydown", (event) => {
      if (composing(event)) return;
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    this.body.replaceWith(form);
    this.buttons.hidden = true;
    field.focus();
  }
}

function textField(label, value) {
  const field = document.createElement("textarea");
  field.setAttribute("aria-label", label);
  field.dir = "auto";
  field.rows = Math.min(Math.max(value.split("\n").length, 3), 16);
  field.value = value;
  return field;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not complete, or no JSON at all
  }
}

// Returns a form for the results of calls; `send` takes a list of texts, one for each call.
export function resultForm(calls, send) {
  const form = element("form", "results");
  const fields = calls.map(({ function: { name } }) => {
    const label = element("label", "", t("resultOf", name));
    const field = textField(t("resultOf", name), "");
    field.placeholder = t("resultNote", name);
    label.append(field);
    form.append(label);
    return field;
  });
  const sent = () => send(fields.map(({ value }) => value));
  form.append(button(t("sendResults"), sent, { className: "main" }));
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !composing(event)) sent();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  return form;
}

// Returns what is shown where there is no message.
export function welcome() {
  const node = element("div", "welcome");
  node.append(element("h2", "", t("welcome")), element("p", "", t("welcomeText")));
  return node;
}

// Returns the text of a reply for a screen reader; a very long one's beginning.
export function spoken({ content, tool_calls: calls }) {
  const text = [content, ...(calls ?? []).map((call) => t("calls", call.function.name))].join(" ");
  return text.length > MOST_SPOKEN ? `${text.slice(0, MOST_SPOKEN)}…` : text;
}
