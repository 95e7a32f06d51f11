// What the user sets: sampling, the model, the key, the page's look; and the dialog for it.

import { models } from "./api.js";
import { setLanguage, t, translate } from "./words.js";

const PLACE = "qwen_jax settings";
const KEY_PLACE = "qwen_jax key";

// The numbers of a request: the least and the largest value, and whether it is a whole number.
const NUMBERS = {
  temperature: { least: 0, most: 2 },
  top_p: { least: 0, most: 1 },
  top_k: { least: 0, most: 2 ** 31 - 1, whole: true },
  max_tokens: { least: 1, most: 2 ** 31 - 1, whole: true },
  repetition_penalty: { least: 0.01, most: 100 },
  seed: { least: 0, most: 2 ** 32 - 1, whole: true },
};

const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Tells the weather of a city.",
      parameters: {
        type: "object",
        properties: { city: { type: "string", description: "the city's name" } },
        required: ["city"],
      },
    },
  },
];

// A browser may forbid pages to store anything; then settings last as long as the page.
function stored(place) {
  try {
    return localStorage.getItem(place);
  } catch {
    return null;
  }
}

function store(place, value) {
  try {
    if (value === null) localStorage.removeItem(place);
    else localStorage.setItem(place, value);
  } catch {
    // As above.
  }
}

function read() {
  try {
    const found = JSON.parse(stored(PLACE) ?? "{}");
    return found !== null && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

const values = { language: "auto", colours: "auto", model: "", ...read() };
let key = stored(KEY_PLACE) ?? "";
let served = [];

export const apiKey = () => key;
export const model = () => (served.find(({ id }) => id === values.model) ?? served[0])?.id ?? "";
export const longest = () => served.find(({ id }) => id === model())?.longest ?? null;

function set(name, value) {
  if (value === null) delete values[name];
  else values[name] = value;
  store(PLACE, JSON.stringify(values));
}

// Returns the fields of a request that the user has set.
export function sampling() {
  const set = Object.keys(NUMBERS).filter((name) => problem(name, values[name]) === null);
  return Object.fromEntries(set.map((name) => [name, values[name]]));
}

// Says what is wrong with a number; null for nothing.
function problem(name, value) {
  const { least, most, whole } = NUMBERS[name];
  const fits = typeof value === "number" && value >= least && value <= most;
  if (fits && (!whole || Number.isInteger(value))) return null;
  const range = most === 2 ** 31 - 1 ? t("atLeast", least) : t("range", least, most);
  return whole ? `${t("whole")}, ${range}` : range;
}

// Returns the tools of a conversation's JSON, null for none. Raises Error for what is no such list.
export function toolsOf(text) {
  if (text.trim() === "") return null;
  const found = JSON.parse(text);
  if (!Array.isArray(found)) throw new Error(t("toolsList"));
  const tools = found.map((one) => (one?.function ? one : { type: "function", function: one }));
  const named = tools.every((one) => typeof one.function?.name === "string");
  if (!named) throw new Error(t("toolsList"));
  return tools.length > 0 ? tools : null;
}

export function applyLook() {
  setLanguage(values.language);
  document.documentElement.dataset.colours = values.colours;
  translate(document);
}

const $ = (id) => document.getElementById(id);

// The dialog. `conversation` returns the present one; `changed` is called when it is changed,
// `look` after the page's words and colours are, and `keyed` for another key.
export class SettingsDialog {
  constructor({ conversation, changed, look, keyed }) {
    Object.assign(this, { conversation, changed, look, keyed });
    this.dialog = $("settings");
    this.addNumbers();
    this.listen();
    $("settings-done").addEventListener("click", () => this.dialog.close());
  }

  open(focused = null) {
    const { system, tools, toolChoice } = this.conversation();
    $("system").value = system;
    $("tools").value = tools;
    $("tool-choice").value = toolChoice;
    $("api-key").value = key;
    $("remember").checked = stored(KEY_PLACE) !== null;
    $("language").value = values.language;
    $("colours").value = values.colours;
    this.checkTools();
    this.dialog.showModal();
    if (focused) $(focused).focus();
    this.listModels();
  }

  addNumbers() {
    for (const name of Object.keys(NUMBERS)) {
      const row = document.createElement("div");
      row.className = "field";
      row.innerHTML = `<label for="${name}" data-t="${name}"></label>
        <input id="${name}" type="number" step="any" aria-describedby="${name}-note">
        <p id="${name}-note" class="note"></p>`;
      $("numbers").append(row);
      const input = $(name);
      input.value = values[name] ?? "";
      input.addEventListener("input", () => this.takeNumber(name, input));
      input.min = NUMBERS[name].least;
    }
    translate($("numbers"));
  }

  takeNumber(name, input) {
    const empty = input.value === "" && !input.validity.badInput;
    const wrong = empty ? null : problem(name, input.valueAsNumber);
    input.setAttribute("aria-invalid", String(wrong !== null));
    $(`${name}-note`).textContent = wrong === null ? "" : t("notUsed", wrong);
    set(name, empty || wrong !== null ? null : input.valueAsNumber);
  }

  listen() {
    const changes = (id, act, event = "input") => $(id).addEventListener(event, act);
    const change = (name, value) =>
      this.changed(Object.assign(this.conversation(), { [name]: value }));
    changes("system", () => change("system", $("system").value));
    changes("tools", () => {
      change("tools", $("tools").value);
      this.checkTools();
    });
    changes("tool-choice", () => change("toolChoice", $("tool-choice").value));
    changes(
      "tools-example",
      () => {
        $("tools").value = JSON.stringify(EXAMPLE, null, 2);
        $("tools").dispatchEvent(new Event("input"));
      },
      "click",
    );
    changes(
      "reset",
      () => {
        for (const name of Object.keys(NUMBERS)) {
          $(name).value = "";
          this.takeNumber(name, $(name));
        }
      },
      "click",
    );
    changes("model", () => set("model", $("model").value));
    for (const name of ["language", "colours"]) {
      changes(name, () => {
        set(name, $(name).value);
        applyLook();
        this.look();
      });
    }
    const keyChanged = () => {
      key = $("api-key").value.trim();
      store(KEY_PLACE, $("remember").checked && key ? key : null);
    };
    changes("api-key", keyChanged);
    changes("remember", keyChanged);
    changes("api-key", () => this.listModels().then(this.keyed), "change");
  }

  checkTools() {
    let wrong = "";
    try {
      toolsOf($("tools").value);
    } catch (error) {
      wrong = t("toolsBad", error.message);
    }
    $("tools").setAttribute("aria-invalid", String(wrong !== ""));
    $("tools-wrong").textContent = wrong;
  }

  // Asks the server for its models, and shows them. Returns the error, or null.
  async listModels() {
    let failure = null;
    try {
      served = await models(key);
    } catch (error) {
      failure = error;
    }
    $("model").replaceChildren(...served.map(({ id }) => new Option(id, id)));
    $("model").value = model();
    $("models-wrong").textContent = failure ? t("noModels", failure.message || failure.kind) : "";
    return failure;
  }
}
