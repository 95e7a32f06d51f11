// The conversation that is shown: its messages, the field to write in, and the replies that are
// written, which go on when another conversation is shown.

import { button } from "./buttons.js";
import { openCalls, titleOf } from "./conversations.js";
import { composing } from "./keys.js";
import { MessageView, resultForm, spoken, welcome } from "./messages.js";
import * as replies from "./reply.js";
import { apiKey, model, sampling, toolsOf } from "./settings.js";
import { t } from "./words.js";

const NEAR = 60; // pixels above the end at which new text is followed
const SAVED_EVERY = 1000; // milliseconds

const $ = (id) => document.getElementById(id);

export class Chat {
  // changed: called with a conversation that has to be kept.
  // settings: opens the dialog, at a field.
  constructor({ changed, settings }) {
    Object.assign(this, { changed, settings });
    this.running = new Map(); // by a conversation's id: {controller, message}
    this.errors = new Map(); // by a conversation's id: what the last request came to
    this.views = new Map(); // by message
    this.follows = true; // whether new text is followed, and where the log was last moved to
    this.top = 0;
    this.log = $("log");
    this.input = $("input");
    this.listen();
  }

  listen() {
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running.has(this.conversation.id)) this.stop();
      else this.send();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || composing(event) || onPhone()) return;
      event.preventDefault();
      if (!this.running.has(this.conversation.id)) this.send();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || composing(event)) return;
      if (!document.querySelector("dialog[open]")) this.stop();
    });
    if (!CSS.supports("field-sizing", "content")) {
      this.input.addEventListener("input", () => {
        this.input.rows = Math.min(this.input.value.split("\n").length, 10);
      });
    }
    this.log.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.log;
      this.follows = scrollHeight - scrollTop - clientHeight < NEAR;
      $("to-end").hidden = this.follows;
    });
    $("to-end").addEventListener("click", () => {
      this.follows = true;
      this.top = 0;
      this.toEnd();
      this.input.focus();
    });
  }

  // Shows a conversation.
  show(conversation) {
    this.conversation = conversation;
    this.views.clear();
    this.resultIds = null;
    this.log.replaceChildren();
    this.follows = true;
    this.top = 0;
    this.draw();
  }

  // Draws what has changed besides the text of a reply.
  draw() {
    const { messages, system } = this.conversation;
    const run = this.running.get(this.conversation.id);
    const nodes = [];
    if (messages.length === 0) nodes.push(welcome());
    if (system.trim() !== "") nodes.push(this.systemNode(system));
    const names = new Map(); // of called functions, by the call's id
    for (const message of messages) {
      for (const call of message.tool_calls ?? []) names.set(call.id, call.function.name);
      const name = message.name ?? names.get(message.tool_call_id) ?? "";
      const view = this.views.get(message) ?? new MessageView(message, { actions: this, name });
      this.views.set(message, view);
      view.draw({ writing: run?.message === message, last: message === messages.at(-1) && !run });
      nodes.push(view.element);
    }
    const calls = run ? [] : openCalls(this.conversation);
    if (calls.length > 0) nodes.push(this.resultNode(calls));
    nodes.push(...this.errorNodes(run));
    arrange(this.log, nodes);
    this.drawButton();
    this.toEnd();
  }

  // Returns the form for results; what was typed into it stays.
  resultNode(calls) {
    const ids = calls.map(({ id }) => id).join(" ");
    if (this.resultIds !== ids) {
      this.resultIds = ids;
      this.resultForm = resultForm(calls, (texts) => this.results(calls, texts));
    }
    return this.resultForm;
  }

  systemNode(system) {
    const node = document.createElement("section");
    node.className = "message system";
    const who = document.createElement("h2");
    who.className = "who";
    who.textContent = t("system");
    const body = document.createElement("div");
    body.className = "body";
    body.dir = "auto";
    body.textContent = system;
    node.append(
      who,
      body,
      button(t("edit"), () => this.settings("system"), { icon: "edit", className: "small" }),
    );
    return node;
  }

  // Returns what tells of the last request's error, and what can be done.
  errorNodes(run) {
    const error = this.errors.get(this.conversation.id);
    const last = this.conversation.messages.at(-1);
    const waits = last !== undefined && last.role !== "assistant" && !run;
    if (!error && !(waits && openCalls(this.conversation).length === 0)) return [];
    const node = document.createElement("div");
    node.className = error ? "error" : "row";
    const text = document.createElement("p");
    text.textContent = error?.text ?? "";
    if (error) node.append(text);
    if (error?.status === 401)
      node.append(button(t("enterKey"), () => this.settings("api-key"), { className: "main" }));
    if (waits) node.append(button(t("tryAgain"), () => this.answer(), { icon: "again" }));
    return [node];
  }

  drawButton() {
    const runs = this.running.has(this.conversation.id);
    const label = t(runs ? "stop" : "send");
    $("send").title = label;
    $("send").setAttribute("aria-label", label);
    $("send")
      .querySelector("use")
      .setAttribute("href", runs ? "#i-stop" : "#i-send");
  }

  toEnd() {
    if (this.log.scrollTop < this.top - NEAR) this.follows = false; // the reader has just gone back
    if (this.follows) {
      this.log.scrollTop = this.log.scrollHeight;
      this.top = this.log.scrollTop;
    }
    $("to-end").hidden = this.follows;
  }

  // Tells a screen reader, and only it.
  say(text) {
    $("status").textContent = text;
  }

  send() {
    const text = this.input.value;
    if (text.trim() === "") return;
    if (openCalls(this.conversation).length > 0) {
      this.say(t("resultsFirst"));
      this.log.querySelector(".results textarea").focus();
      return;
    }
    this.input.value = "";
    this.input.dispatchEvent(new Event("input"));
    if (!onPhone()) this.input.focus();
    this.add({ role: "user", content: text });
  }

  // Adds a message to the conversation, and asks for the reply.
  add(...messages) {
    const { conversation } = this;
    conversation.messages.push(...messages);
    conversation.title ||= titleOf(conversation.messages);
    this.follows = true;
    this.keep(conversation);
    this.answer();
  }

  results(calls, texts) {
    const message = (call, index) => ({
      role: "tool",
      tool_call_id: call.id,
      content: texts[index],
    });
    this.add(...calls.map(message));
    this.input.focus();
  }

  // Changes a message. A question's or a result's later messages go, and the reply is written anew.
  edit(message, text) {
    const { messages } = this.conversation;
    message.content = text;
    if (message.role === "assistant") {
      this.keep(this.conversation);
      this.draw();
      return;
    }
    this.drop(this.conversation);
    messages.splice(messages.indexOf(message) + 1);
    this.keep(this.conversation);
    if (openCalls(this.conversation).length > 0) this.draw();
    else this.answer();
    this.input.focus();
  }

  // Writes a reply again. It stays if nothing comes in its place.
  again(message) {
    const { messages } = this.conversation;
    messages.splice(messages.indexOf(message));
    this.answer({ replaced: message });
    this.input.focus();
  }

  continue(message) {
    this.answer({ continued: message });
    this.input.focus();
  }

  stop(conversation = this.conversation) {
    this.running.get(conversation.id)?.controller.abort();
  }

  // Stops a reply that nobody wants any more.
  drop(conversation) {
    this.stop(conversation);
    this.running.delete(conversation.id);
    this.errors.delete(conversation.id);
  }

  // Asks for a reply to the conversation as it is, or for more of its last one. A reply that it
  // replaces is no longer in the conversation.
  async answer({ continued = null, replaced = null } = {}) {
    const { conversation } = this;
    this.top = 0; // the log may be shorter now
    const controller = new AbortController();
    let tools = null;
    try {
      tools = toolsOf(conversation.tools);
    } catch {
      // The settings say what is wrong with them; nothing is sent.
    }
    const body = replies.request(conversation, {
      model: model(),
      tools,
      sampling: sampling(),
      continued,
    });
    const message = continued ?? {
      role: "assistant",
      content: "",
      about: { model: model(), figures: {} },
    };
    message.about.finish = "";
    if (!continued) conversation.messages.push(message);
    this.running.set(conversation.id, { controller, message });
    this.errors.delete(conversation.id);
    const shown = () => this.conversation === conversation;
    this.draw();
    this.say(t("writing"));
    let saved = performance.now();
    const wanted = () => this.running.get(conversation.id)?.controller === controller;
    const changed = () => {
      if (!wanted()) return;
      if (this.errors.delete(conversation.id) && shown()) this.draw();
      if (shown()) this.views.get(message).soon(() => this.toEnd());
      if (performance.now() - saved < SAVED_EVERY) return;
      saved = performance.now();
      this.changed(conversation);
    };
    const waits = (error, seconds) => {
      const text = t("busy", error.message, seconds);
      if (!this.errors.has(conversation.id)) this.say(text);
      this.errors.set(conversation.id, { text });
      if (shown()) this.draw();
    };
    const options = { key: apiKey(), signal: controller.signal, changed, waits };
    const error = await replies.write(message, body, options).then(
      () => null,
      (one) => one,
    );
    if (!wanted()) return;
    this.running.delete(conversation.id);
    this.ended(conversation, message, { error, replaced });
    this.keep(conversation);
    if (shown()) this.draw();
  }

  // Notes how a reply has ended. One of which nothing came is none, and replaces none.
  ended(conversation, message, { error, replaced }) {
    const { about, content, tool_calls: calls } = message;
    this.errors.delete(conversation.id);
    if (error?.name === "AbortError") about.finish = "stopped";
    else if (error?.kind === "broken") about.finish = "broken";
    if (error && !content && !calls) {
      const { messages } = conversation;
      messages.splice(messages.indexOf(message), 1, ...(replaced ? [replaced] : []));
    }
    if (error && error.name !== "AbortError") {
      this.errors.set(conversation.id, { text: replies.explained(error), status: error.status });
    }
    if (this.conversation !== conversation) return;
    this.say(
      error
        ? (this.errors.get(conversation.id)?.text ?? t("stopped"))
        : t("complete", spoken(message)),
    );
  }

  keep(conversation) {
    conversation.changed = Date.now();
    this.changed(conversation);
  }
}

const onPhone = () => matchMedia("(pointer: coarse)").matches;

// Makes nodes the children of an element. Those that stay are not moved, so they keep the focus.
function arrange(element, nodes) {
  for (const child of [...element.children]) {
    if (!nodes.includes(child)) child.remove();
  }
  nodes.forEach((node, index) => {
    if (element.children[index] !== node)
      element.insertBefore(node, element.children[index] ?? null);
  });
}
