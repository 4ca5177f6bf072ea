// Visits a page for a test, as somebody with a browser: the same lines in and out as driver.mjs.
//
// node visitor.mjs chromium|firefox EXECUTABLE PROFILE-FOLDER

import { createInterface } from "node:readline";

import { launch, say } from "./launch.mjs";

const [browserName, executablePath, userDataDir] = process.argv.slice(2);
const browser = await launch(browserName, executablePath, userDataDir);
const page = await browser.newPage();
const problems = []; // what the browser complains of
const requests = new Set(); // all that it asks for

page.on("console", (message) => {
  if (["error", "warn"].includes(message.type())) problems.push(message.text());
});
page.on("pageerror", (error) => problems.push(String(error)));
page.on("request", (request) => requests.add(request.url()));

const calls = {
  // Open a page in a window of that size, in the dark or not. Its requests are those that count.
  async open(url, width, height, isDark) {
    await page.setViewport({ width, height, deviceScaleFactor: 1 });
    const scheme = isDark ? "dark" : "light";
    if (browserName === "chromium") // Firefox cannot be told
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    requests.clear();
    await page.goto(url);
  },
  evaluate: (expression) => page.evaluate(expression),
  // Wait until an expression is true.
  until: async (expression) => void (await page.waitForFunction(expression, { timeout: 0 })),
  fill: async (selector, text) => {
    await page.$eval(selector, (field) => (field.value = ""));
    await page.type(selector, text);
  },
  click: (selector) => page.click(selector),
  picture: async (path, fullPage) => void (await page.screenshot({ path, fullPage })),
  problems: async () => problems.splice(0),
  requests: async () => [...requests],
};

say({ id: 0, result: await browser.version() });
for await (const line of createInterface({ input: process.stdin })) {
  const { id, call, arguments: given } = JSON.parse(line);
  calls[call](...given)
    .then((result) => say({ id, result: result ?? null }))
    .catch((error) => say({ id, error: String(error) }));
}
await browser.close();
