// Server-sent events from a fetch: an EventSource can send neither a body nor a key.

/** Yields the data of each event of a byte stream, whatever the borders of its chunks. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      const parts = buffer.split(/\r?\n\r?\n/);
      buffer = parts.pop();
      for (const part of parts) {
        const data = dataOf(part);
        if (data !== null) yield data;
      }
    }
  } finally {
    // Leaving early closes the connection, which frees the server's slot.
    await reader.cancel().catch(() => {});
  }
}

/** Joins an event's data lines; null for comments, which keep a connection open. */
function dataOf(event) {
  const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  if (!lines.length) return null;
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}
