// Serves calls by JSON lines: see ../program.py.

import { createInterface } from "node:readline";

export async function serve(calls) {
  say({ id: 0, result: "ready" });
  for await (const line of createInterface({ input: process.stdin })) {
    const { id, call, arguments: given } = JSON.parse(line);
    Promise.resolve()
      .then(() => calls[call](...given))
      .then((result) => say({ id, result: result ?? null }))
      .catch((error) => say({ id, error: String(error) }));
  }
  process.exit(0); // whatever a stack would still wait for
}

// What has come, for whoever waits for it.
export class Inbox {
  received = [];
  waiting = () => {};

  put(data) {
    this.received.push(String(data));
    this.waiting();
  }

  async take(count) {
    while (this.received.length < count) await new Promise((resolve) => (this.waiting = resolve));
    return this.received.splice(0, count);
  }
}

function say(message) {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}
