// How browsers are started, and how programs here answer.

import puppeteer from "puppeteer-core";

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

export function launch(browserName, executablePath, userDataDir) {
  return puppeteer.launch({
    ...OPTIONS[browserName],
    executablePath,
    userDataDir,
    headless: true,
    pipe: browserName === "chromium",
    protocolTimeout: 0, // whoever calls has the patience
  });
}

export function say(message) {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}
