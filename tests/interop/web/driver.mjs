// Drives a browser for a test: {"id", "call", "arguments"} per line in, {"id", "result"} or
// {"id", "error"} per line out. A call is one of `ends` in page.js.
//
// node driver.mjs chromium|firefox EXECUTABLE PROFILE-FOLDER

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createInterface } from "node:readline";

import { launch, say } from "./launch.mjs";

const [browserName, executablePath, userDataDir] = process.argv.slice(2);

const TYPES = { html: "text/html", js: "text/javascript" };

async function serve(request, response) {
  const name = request.url === "/" ? "page.html" : request.url.slice(1);
  const type = TYPES[name.split(".").at(-1)];
  if (!["page.html", "page.js"].includes(name)) return response.writeHead(404).end();
  response.writeHead(200, { "content-type": type });
  return response.end(await readFile(new URL(name, import.meta.url)));
}

const server = createServer(serve).listen(0, "127.0.0.1");
await new Promise((resolve) => server.once("listening", resolve));
const browser = await launch(browserName, executablePath, userDataDir);
const page = await browser.newPage();
page.on("console", (message) => console.error(message.text()));
page.on("pageerror", (error) => console.error(error));
await page.goto(`http://127.0.0.1:${server.address().port}/`);
say({ id: 0, result: await browser.version() });

for await (const line of createInterface({ input: process.stdin })) {
  const { id, call, arguments: given } = JSON.parse(line);
  page
    .evaluate((name, values) => globalThis.ends[name](...values), call, given)
    .then((result) => say({ id, result: result ?? null }))
    .catch((error) => say({ id, error: String(error) }));
}
await browser.close();
server.close();
