// Requests to the server, whose addresses are relative: the page works behind a proxy's path, too.

// kind: "refused" for an answer that is an error, "broken" for a stream that did not end,
// "unreachable" where no answer came. retryAfter: seconds after which the server wants another try.
export class ApiError extends Error {
  constructor(message, { kind, status = 0, retryAfter = null }) {
    super(message);
    Object.assign(this, { kind, status, retryAfter });
  }
}

// Returns the models that are served: their ids, and the most tokens of a request.
export async function models(key) {
  const answer = await send("v1/models", { headers: headers(key) });
  return (await answer.json()).data.map((one) => ({ id: one.id, longest: one.max_model_len }));
}

// Yields the chunks of a reply, as the server streams them, until they end. Raises ApiError.
export async function* chat(body, { key, signal }) {
  const answer = await send("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, { kind: "refused", status: 500 });
    yield chunk;
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function send(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(error.message, { kind: "unreachable" });
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

// Returns the error that an answer tells: OpenAI's shape, or whatever a proxy wrote.
async function refusal(answer) {
  const text = await answer.text().catch(() => "");
  let message = `${answer.status} ${answer.statusText}`;
  try {
    message = JSON.parse(text).error.message ?? message;
  } catch {
    // The status has to do.
  }
  const seconds = Number.parseFloat(answer.headers.get("retry-after"));
  const retryAfter = Number.isFinite(seconds) ? Math.max(seconds, 0) : null;
  return new ApiError(message, { kind: "refused", status: answer.status, retryAfter });
}

// Yields the data of server-sent events. Lines end as the server likes; comments are left out.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line !== "" || data.length === 0) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(error.message, { kind: "broken" });
  }
}
