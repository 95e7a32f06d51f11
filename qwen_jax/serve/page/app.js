// Starts the page: the list of conversations, and what can be done with the one that is shown.

import { Chat } from "./chat.js";
import * as conversations from "./conversations.js";
import { composing } from "./keys.js";
import { applyLook, SettingsDialog } from "./settings.js";
import { t } from "./words.js";

const $ = (id) => document.getElementById(id);

const known = new Map(); // all conversations, by id
let warned = false; // whether the user knows that nothing is stored

applyLook();
const chat = new Chat({ changed: keep, settings: (field) => settings.open(field) });
const settings = new SettingsDialog({
  conversation: () => chat.conversation,
  changed: (conversation) => {
    keep(conversation);
    chat.draw();
  },
  look: () => {
    drawList();
    chat.show(chat.conversation);
  },
  keyed: () => notice(""),
});

async function keep(conversation) {
  known.set(conversation.id, conversation);
  drawList();
  await stored(conversations.keep(conversation));
}

async function stored(work) {
  try {
    return await work;
  } catch (error) {
    if (!warned) notice(t("notStored", error.message));
    warned = true;
    return null;
  }
}

function notice(text) {
  $("notice-text").textContent = text;
  $("notice").hidden = text === "";
}

function show(conversation) {
  chat.show(conversation);
  drawList();
  openSide(false);
}

function drawList() {
  const shown = chat.conversation;
  const sorted = [...known.values()].sort((one, other) => other.changed - one.changed);
  const items = sorted.map((each) => {
    const item = document.createElement("li");
    const opener = document.createElement("button");
    opener.type = "button";
    opener.dir = "auto";
    opener.textContent = each.title || t("untitled");
    if (each === shown) opener.setAttribute("aria-current", "true");
    opener.addEventListener("click", () => {
      show(each);
      $("input").focus();
    });
    item.append(opener);
    return item;
  });
  $("list").replaceChildren(...items);
  $("title").textContent = shown?.title || t("untitled");
  document.title = shown?.title ? `${shown.title} – qwen_jax` : "qwen_jax";
  for (const id of ["rename", "export", "remove"]) $(id).disabled = !known.has(shown?.id);
  $("export-all").disabled = known.size === 0;
}

// Shows or hides the list where the page is narrow; elsewhere it is always there.
function openSide(open) {
  $("side").classList.toggle("open", open);
  $("shade").hidden = !open;
  $("menu").setAttribute("aria-expanded", String(open));
  document.querySelector("main").inert = open;
  if (open) $("new").focus();
}

function closeSide() {
  if (!$("side").classList.contains("open")) return;
  openSide(false);
  $("menu").focus();
}

// Asks in a dialog. Returns the text of its field, or "" without one; null if it was cancelled.
function ask({ title, text = "", value = null, ok, danger = false }) {
  const dialog = $("ask");
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-field").hidden = value === null;
  $("ask-input").value = value ?? "";
  $("ask-ok").textContent = ok;
  $("ask-ok").classList.toggle("danger", danger);
  dialog.returnValue = "";
  dialog.showModal();
  if (value !== null) $("ask-input").select();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "ok" ? $("ask-input").value : null);
  });
}

async function rename() {
  const { conversation } = chat;
  const asked = { title: t("renameTitle"), value: conversation.title, ok: t("save") };
  const title = (await ask(asked))?.trim();
  if (!title) return;
  conversation.title = title;
  await keep(conversation);
}

async function remove() {
  const { conversation } = chat;
  const text = t("removeText", conversation.title || t("untitled"));
  const asked = { title: t("removeTitle"), text, ok: t("remove"), danger: true };
  if ((await ask(asked)) === null) return;
  forget(conversation);
  await stored(conversations.remove(conversation.id));
  $("input").focus();
}

function forget(conversation) {
  chat.drop(conversation);
  known.delete(conversation.id);
  if (chat.conversation === conversation) show(conversations.fresh());
  else drawList();
}

function download(list) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(
    new Blob([conversations.exported(list)], { type: "application/json" }),
  );
  const day = new Date().toISOString().slice(0, 10);
  link.download = list.length === 1 ? `conversation-${day}.json` : `conversations-${day}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function load(file) {
  try {
    const list = await conversations.imported(file);
    for (const each of list) await keep(each);
    if (list.length > 0) show(list[0]);
    notice(t("imported", list.length));
  } catch (error) {
    notice(t("notImported", file.name, error.message));
  }
}

function listen() {
  const clicks = (id, act) => $(id).addEventListener("click", act);
  clicks("new", () => {
    show(conversations.fresh());
    $("input").focus();
  });
  clicks("menu", () => openSide(!$("side").classList.contains("open")));
  clicks("shade", closeSide);
  clicks("side-close", closeSide);
  clicks("notice-close", () => notice(""));
  clicks("open-settings", () => settings.open());
  clicks("rename", rename);
  clicks("remove", remove);
  clicks("export", () => download([chat.conversation]));
  clicks("export-all", () => download([...known.values()]));
  clicks("import", () => $("file").click());
  clicks("ask-ok", () => $("ask").close("ok"));
  clicks("ask-cancel", () => $("ask").close(""));
  $("ask-input").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || composing(event)) return;
    event.preventDefault(); // otherwise Enter also presses the button that gets the focus back
    $("ask").close("ok");
  });
  $("file").addEventListener("change", async () => {
    for (const file of $("file").files) await load(file);
    $("file").value = "";
  });
  $("side").addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation(); // which would stop the reply
    closeSide();
  });
  matchMedia("(min-width: 50rem)").addEventListener("change", () => openSide(false));
  conversations.watch((id, conversation) => {
    if (chat.running.has(id)) return;
    const here = known.get(id);
    if (!conversation) {
      if (here) forget(here);
      return;
    }
    known.set(id, conversation);
    if (chat.conversation.id === id) chat.show(conversation);
    drawList();
  });
}

async function start() {
  chat.show(conversations.fresh());
  listen();
  for (const each of (await stored(conversations.all())) ?? []) known.set(each.id, each);
  drawList();
  const failure = await settings.listModels();
  if (failure?.status === 401) settings.open("api-key");
  else if (failure) notice(t("noModels", failure.message || failure.kind));
}

start();
