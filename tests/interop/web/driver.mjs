// Drives a browser for a test: {"id", "call", "arguments"} per line in, {"id", "result"} or
// {"id", "error"} per line out. A call is one of `ends` in page.js.
//
// node driver.mjs chromium|firefox EXECUTABLE PROFILE-FOLDER

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createInterface } from "node:readline";
import puppeteer from "puppeteer-core";

const [browserName, executablePath, userDataDir] = process.argv.slice(2);

const OPTIONS = {
  chromium: {
    browser: "chrome",
    args: [
      "--no-sandbox", // root has none
      "--disable-gpu",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
      "--use-fake-device-for-media-stream",
      "--use-fake-ui-for-media-stream",
    ],
  },
  firefox: {
    browser: "firefox",
    extraPrefsFirefox: {
      "media.navigator.streams.fake": true,
      "media.navigator.permission.disabled": true,
      "media.peerconnection.ice.obfuscate_host_addresses": false,
      // It would look for updates, and so on.
      "app.update.enabled": false,
      "media.gmp-manager.updateEnabled": false,
      "network.captive-portal-service.enabled": false,
      "network.connectivity-service.enabled": false,
    },
  },
};

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
const browser = await puppeteer.launch({
  ...OPTIONS[browserName],
  executablePath,
  userDataDir,
  headless: true,
  pipe: browserName === "chromium",
  protocolTimeout: 0, // whoever calls has the patience
});
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

function say(message) {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}
