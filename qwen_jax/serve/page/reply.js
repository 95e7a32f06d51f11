// One reply: asked for, written down as it comes, counted.

import { ApiError, chat } from "./api.js";
import { t } from "./words.js";

const TRIES = 4; // of a request that the server puts off
const LONGEST_WAIT = 60; // seconds
const LEAST_TIME = 200; // milliseconds of which a rate is told

// The fields of a message that the server is told.
function told({ role, content, tool_calls, tool_call_id }) {
  const calls = tool_calls?.length ? { tool_calls } : {};
  const id = tool_call_id ? { tool_call_id } : {};
  return { role, content: content === "" && tool_calls?.length ? null : content, ...calls, ...id };
}

// Returns the request for a conversation's next reply.
export function request(conversation, { model, tools, sampling, continued }) {
  const system =
    conversation.system.trim() === ""
      ? []
      : [told({ role: "system", content: conversation.system })];
  const choice =
    tools && conversation.toolChoice !== "auto" ? { tool_choice: conversation.toolChoice } : {};
  return {
    ...(model ? { model } : {}),
    messages: [...system, ...conversation.messages.map(told)],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...(tools ? { tools, ...choice } : {}),
    ...sampling,
    ...(continued ? { continue_final_message: true, add_generation_prompt: false } : {}),
  };
}

// Writes the reply to a request into a message, and calls `changed` after each piece. A server that
// is busy is asked again after the time that it names, which `waits(error, seconds)` shows. Raises
// ApiError, and AbortError when the signal stops it.
export async function write(message, body, { key, signal, changed, waits }) {
  const clock = new Clock(message);
  for (let attempt = 1; ; attempt++) {
    try {
      for await (const chunk of chat(body, { key, signal })) {
        take(message, chunk);
        clock.take(chunk);
        changed();
      }
      if (message.about.finish === "") throw new ApiError("", { kind: "broken" });
      return;
    } catch (error) {
      const later = error.retryAfter ?? null;
      if (later === null || attempt === TRIES || later > LONGEST_WAIT) throw error;
      await wait(later, signal, (left) => waits(error, left));
    }
  }
}

function take(message, { choices, model }) {
  if (model) message.about.model = model;
  const choice = choices[0];
  if (!choice) return;
  const { content, tool_calls: calls } = choice.delta;
  if (content) message.content += content;
  for (const { index, id, function: made } of calls ?? []) {
    message.tool_calls ??= [];
    message.tool_calls[index] ??= {
      id: "",
      type: "function",
      function: { name: "", arguments: "" },
    };
    const call = message.tool_calls[index];
    call.id ||= id ?? "";
    call.function.name += made?.name ?? "";
    call.function.arguments += made?.arguments ?? "";
  }
  if (choice.finish_reason) message.about.finish = choice.finish_reason;
}

// Counts the tokens of a reply, and what they take: seconds to the first ones, and the rate of the
// others. The figures of a reply that is continued stay until its first new token.
class Clock {
  constructor(message) {
    this.message = message;
    this.before = message.about.figures.tokens ?? 0; // of a reply that is continued
    this.asked = performance.now();
  }

  take({ usage }) {
    const now = performance.now();
    const count = usage?.completion_tokens;
    if (!count) return;
    if (!this.begun) {
      this.begun = { now, count };
      this.figures = this.message.about.figures = { first: (now - this.asked) / 1000 };
    }
    if (count !== this.count && now - this.begun.now >= LEAST_TIME) {
      this.figures.rate = ((count - this.begun.count) / (now - this.begun.now)) * 1000;
    }
    this.count = count;
    this.figures.tokens = this.before + count;
    this.figures.prompt = usage.prompt_tokens;
    this.figures.context = usage.prompt_tokens + count;
    this.figures.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  }
}

// Waits, and calls `tell` each second with the seconds that are left.
async function wait(seconds, signal, tell) {
  for (let left = Math.ceil(seconds); left > 0; left--) {
    tell(left);
    await new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, 1000);
      signal.addEventListener(
        "abort",
        () => {
          clearTimeout(timer);
          reject(new DOMException("", "AbortError"));
        },
        { once: true },
      );
    });
  }
}

// Returns the words for an error.
export function explained(error) {
  if (error.kind === "unreachable") return t("unreachable");
  if (error.kind === "broken") return t("broken");
  if (error.status === 401) return t("key", error.message);
  if (error.kind === "refused") return t("failed", error.status, error.message);
  return t("unexpected", error.message);
}
