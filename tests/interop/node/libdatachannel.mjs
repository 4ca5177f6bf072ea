// A WebRTC end by libdatachannel, whose ICE is libjuice's. Relayed candidates only.
//
// node libdatachannel.mjs ICE-SERVER

import libdatachannel from "node-datachannel";
import { Inbox, serve } from "./serve.mjs";

const { urls, username, credential } = JSON.parse(process.argv[2]);
const [, hostname, port] = urls.match(/^turn:(.*):(\d+)/);
const pc = new libdatachannel.PeerConnection("end", {
  iceServers: [{ hostname, port: Number(port), username, password: credential, relayType: "TurnUdp" }],
  iceTransportPolicy: "relay",
});
const inbox = new Inbox();
let channel;
let isOpen;
const opened = new Promise((resolve) => (isOpen = resolve));
const gathered = new Promise((resolve) =>
  pc.onGatheringStateChange((state) => {
    if (state === "complete") resolve();
  }),
);

pc.onDataChannel(use);

function use(ours) {
  channel = ours;
  channel.onOpen(() => isOpen());
  if (channel.isOpen()) isOpen();
  channel.onMessage((data) => inbox.put(data));
}

async function description() {
  await gathered;
  return pc.localDescription().sdp;
}

await serve({
  offer() {
    use(pc.createDataChannel("data"));
    return description();
  },

  answer(sdp) {
    pc.setRemoteDescription(sdp, "offer");
    return description();
  },

  accept(sdp) {
    pc.setRemoteDescription(sdp, "answer");
  },

  opened: () => opened,

  send(messages) {
    for (const message of messages) channel.sendMessage(message);
  },

  receive: (count) => inbox.take(count),
});
