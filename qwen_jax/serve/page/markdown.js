// Turns Markdown of a reply into nodes that can do no harm, also while the reply is written.
//
// HTML in a reply is text to markdown-it, and what it makes goes through DOMPurify. Images become
// links: loading one would tell its server of the conversation.

import MarkdownIt from "./vendor/markdown-it.js";
import hljs from "./vendor/highlight.js";
import "./vendor/purify.js"; // defines DOMPurify
import { copyButton } from "./buttons.js";
import { t } from "./words.js";

const MOST_COLOURED = 50_000; // characters of code; colouring more takes seconds

const DEEPEST = 40; // lists and quotes in each other

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: true, maxNesting: DEEPEST });
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // file.py is no address
markdown.renderer.rules.image = (tokens, index) => {
  const { content } = tokens[index];
  const address = markdown.utils.escapeHtml(tokens[index].attrGet("src"));
  return `<a href="${address}">${markdown.utils.escapeHtml(content) || address}</a>`;
};
for (const rule of ["heading_open", "heading_close"]) {
  // A reply's headings are below the message's.
  markdown.renderer.rules[rule] = (tokens, index, options, env, self) => {
    const level = Math.min(Number(tokens[index].tag[1]) + 2, 6);
    tokens[index].tag = `h${level}`;
    return self.renderToken(tokens, index, options);
  };
}
for (const rule of ["th_open", "td_open"]) {
  // A cell's alignment, which is a style to markdown-it: the page's policy allows none.
  markdown.renderer.rules[rule] = (tokens, index, options, env, self) => {
    const [, side] = /^text-align:(\w+)$/.exec(tokens[index].attrGet("style") ?? "") ?? [];
    tokens[index].attrs = side ? [["class", side]] : null;
    return self.renderToken(tokens, index, options);
  };
}

const ALLOWED = {
  ALLOWED_TAGS: [
    ..."a blockquote br code div em h3 h4 h5 h6 hr li ol p pre s strong".split(" "),
    ..."span table tbody td th thead tr ul".split(" "),
  ],
  ALLOWED_ATTR: ["href", "title", "class", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

// Keeps an element in step with a text that grows: blocks that are complete stay as they are.
export class Rendered {
  constructor(element) {
    this.element = element;
    this.start = 0; // where the blocks begin that may still change
    this.kept = 0; // the blocks before
    this.finished = null; // the text whose final form is shown
  }

  // Shows the text; `done` for its final form, with what links at its end refer to.
  update(text, done) {
    if (done && text === this.finished) return;
    this.finished = done ? text : null;
    if (done) this.start = this.kept = 0;
    const rest = text.slice(this.start);
    const blocks = blocksOf(rest);
    this.show(blocks.map(({ html }) => html));
    if (!done && blocks.length > 2) {
      this.kept += blocks.length - 2;
      this.start += blocks.at(-2).start;
    }
  }

  // Replaces the blocks after those that are kept, but for those that are the same.
  show(htmls) {
    const { children } = this.element;
    const changed = htmls
      .map((html, index) => ({ html, index: this.kept + index }))
      .filter(({ html, index }) => children[index]?.source !== html);
    const all = changed.map(({ html }) => `<div>${html}</div>`).join("");
    const made = [...prepared(globalThis.DOMPurify.sanitize(all, ALLOWED)).children];
    changed.forEach(({ html, index }, number) => {
      const node = made[number];
      node.source = html;
      node.dir = "auto"; // each block has the direction of its first letters
      if (children[index]) children[index].replaceWith(node);
      else this.element.append(node);
    });
    while (children.length > this.kept + htmls.length) this.element.lastChild.remove();
  }
}

// Returns the HTML of each block of a text, and where it starts.
function blocksOf(text) {
  const env = {};
  const lines = [0]; // where each starts, as markdown-it counts them
  for (const { 0: end, index } of text.matchAll(/\r\n?|\n/g)) lines.push(index + end.length);
  const blocks = [];
  let depth = 0;
  for (const token of markdown.parse(text, env)) {
    if (depth === 0) blocks.push([]);
    blocks.at(-1).push(token);
    depth += token.nesting;
  }
  return blocks.map((tokens) => {
    const [first, after] = tokens[0].map;
    const start = lines[first];
    // Of what is nested deeper than this, markdown-it keeps nothing.
    if (tokens.some(({ level }) => level >= DEEPEST - 2)) {
      const escaped = markdown.utils.escapeHtml(text.slice(start, lines[after]));
      return { start, html: `<p>${escaped}</p>` };
    }
    return { start, html: markdown.renderer.render(tokens, markdown.options, env) };
  });
}

// Adds what the sanitiser would not let pass: colours of code, buttons, where links open.
function prepared(fragment) {
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = document.createElement("div");
    frame.className = "wide";
    frame.tabIndex = 0; // so that the keyboard can move it
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const code of fragment.querySelectorAll("pre > code")) {
    const language = code.className.replace(/^language-/, "");
    code.parentElement.replaceWith(codeFrame(code.textContent, language));
  }
  return fragment;
}

// Returns an element that shows code in colours, with a title and a button to copy it.
export function codeFrame(text, language, title = language) {
  const frame = document.createElement("div");
  frame.className = "code";
  frame.dir = "ltr";
  const head = document.createElement("div");
  head.className = "code-head";
  const name = document.createElement("span");
  name.textContent = title;
  head.append(
    name,
    copyButton(() => text, t("copyCode")),
  );
  const pre = document.createElement("pre");
  pre.tabIndex = 0;
  const code = document.createElement("code");
  if (hljs.getLanguage(language) && text.length <= MOST_COLOURED) {
    const { value } = hljs.highlight(text, { language, ignoreIllegals: true });
    code.append(globalThis.DOMPurify.sanitize(value, ALLOWED));
  } else {
    code.textContent = text;
  }
  pre.append(code);
  frame.append(head, pre);
  return frame;
}
