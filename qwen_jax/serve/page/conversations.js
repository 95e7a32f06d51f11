// Conversations: kept in the browser's IndexedDB, written as JSON and read from it.
//
// A conversation is {id, title, created, changed, system, tools, toolChoice, messages}: times in
// milliseconds, `tools` the text of a JSON list. Messages are as in OpenAI's API, but for `about`
// of replies: {model, finish, figures}, which the page shows.

import { t } from "./words.js";

const STORE = "conversations";
const FORMAT = "qwen_jax conversations";
const LARGEST = 50 * 2 ** 20; // bytes of a file

// The other windows of this page, which are told what one of them stores.
const channel = new BroadcastChannel("qwen_jax conversations");

export function fresh() {
  const now = Date.now();
  const id = Array.from(crypto.getRandomValues(new Uint32Array(4)), (x) => x.toString(36)).join("");
  const empty = { title: "", system: "", tools: "", toolChoice: "auto", messages: [] };
  return { id, created: now, changed: now, ...empty };
}

let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("qwen_jax", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function within(mode, work) {
  const transaction = (await database()).transaction(STORE, mode);
  const request = work(transaction.objectStore(STORE));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error ?? request.error);
  });
}

export const all = () => within("readonly", (store) => store.getAll());
const one = (id) => within("readonly", (store) => store.get(id));

export async function keep(conversation) {
  await within("readwrite", (store) => store.put(conversation));
  channel.postMessage(conversation.id);
}

export async function remove(id) {
  await within("readwrite", (store) => store.delete(id));
  channel.postMessage(id);
}

// Calls `changed` with the id of what another window has stored, and with it, or undefined if it
// is deleted.
export function watch(changed) {
  channel.onmessage = async ({ data }) => changed(data, await one(data));
}

export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

// Reads what `exported` writes, or one list of messages, as the chat command saves it. Everything
// is checked, so that a file of another's making brings nothing else in. Raises Error.
export async function imported(file) {
  if (file.size > LARGEST) throw new Error(t("notConversations"));
  let value;
  try {
    value = JSON.parse(await file.text());
  } catch {
    throw new Error(t("notConversations"));
  }
  if (Array.isArray(value)) value = { messages: value };
  const list = Array.isArray(value?.conversations) ? value.conversations : [value];
  return list.map((each, index) =>
    checked(each, list === value?.conversations ? `[${index}].` : ""),
  );
}

function checked(value, place) {
  if (!Array.isArray(value?.messages)) throw new Error(t("notConversations"));
  const made = fresh();
  const messages = value.messages.map((each, index) => message(each, `${place}messages[${index}]`));
  const begins = ["system", "developer"].includes(messages[0]?.role);
  const misplaced = messages.findIndex(
    ({ role }, index) =>
      !["user", "assistant", "tool"].includes(role) && !(begins && index === 0),
  );
  if (misplaced >= 0) throw new Error(t("badPlace", `${place}messages[${misplaced}].role`));
  if (begins) made.system = messages.shift().content;
  for (const name of ["title", "system", "tools"]) {
    if (typeof value[name] === "string") made[name] ||= value[name];
  }
  for (const name of ["created", "changed"]) {
    if (Number.isFinite(value[name])) made[name] = value[name];
  }
  if (["auto", "required", "none"].includes(value.toolChoice)) made.toolChoice = value.toolChoice;
  made.title ||= titleOf(messages);
  return { ...made, messages };
}

function message(value, place) {
  const wrong = (field) => new Error(t("badPlace", `${place}${field}`));
  if (value === null || typeof value !== "object") throw wrong("");
  if (typeof value.role !== "string") throw wrong(".role");
  const made = { role: value.role, content: value.content ?? "" };
  if (typeof made.content !== "string") throw wrong(".content");
  if (value.role === "tool") {
    if (typeof value.tool_call_id !== "string") throw wrong(".tool_call_id");
    made.tool_call_id = value.tool_call_id;
    if (typeof value.name === "string") made.name = value.name;
  }
  const calls = value.tool_calls ?? [];
  if (value.role === "assistant" && calls.length !== 0) {
    if (!Array.isArray(calls)) throw wrong(".tool_calls");
    made.tool_calls = calls.map((each, index) => {
      const { name, arguments: text } = each?.function ?? {};
      const texts = [each?.id, name, text].every((part) => typeof part === "string");
      if (!texts) throw wrong(`.tool_calls[${index}]`);
      return { id: each.id, type: "function", function: { name, arguments: text } };
    });
  }
  if (value.role === "assistant") made.about = about(value.about ?? {});
  return made;
}

function about(value) {
  const made = { model: "", finish: "stop", figures: {} };
  for (const name of ["model", "finish"]) {
    if (typeof value[name] === "string") made[name] = value[name];
  }
  for (const name of ["prompt", "cached", "tokens", "first", "rate", "context"]) {
    const number = value.figures?.[name];
    if (Number.isFinite(number)) made.figures[name] = number;
  }
  return made;
}

// Returns the first words of the first question.
export function titleOf(messages) {
  const text = messages.find(({ role }) => role === "user")?.content ?? "";
  const line = text.trim().split("\n")[0];
  const letters = [...line];
  return letters.length > 60 ? `${letters.slice(0, 59).join("")}…` : line;
}

// Returns the calls of the last reply that have no result yet.
export function openCalls({ messages }) {
  const last = messages.findLastIndex(({ role }) => role === "assistant");
  const after = messages.slice(last + 1);
  if (after.some(({ role }) => role === "user")) return [];
  const answered = new Set(after.map((each) => each.tool_call_id));
  return (messages[last]?.tool_calls ?? []).filter(({ id }) => !answered.has(id));
}
