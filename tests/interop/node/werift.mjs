// A WebRTC end by werift. Relayed candidates only.
//
// node werift.mjs ICE-SERVER

import { RTCPeerConnection } from "werift";
import { Inbox, serve } from "./serve.mjs";

const pc = new RTCPeerConnection({
  iceServers: [JSON.parse(process.argv[2])],
  iceTransportPolicy: "relay",
});
const inbox = new Inbox();
let channel;
let isOpen;
const opened = new Promise((resolve) => (isOpen = resolve));

pc.ondatachannel = (event) => use(event.channel);

function use(ours) {
  channel = ours;
  channel.onopen = () => isOpen();
  if (channel.readyState === "open") isOpen();
  channel.onmessage = ({ data }) => inbox.put(data);
}

async function describe(description) {
  await pc.setLocalDescription(description); // which gathers all candidates
  return pc.localDescription.sdp;
}

await serve({
  async offer() {
    use(pc.createDataChannel("data"));
    return describe(await pc.createOffer());
  },

  async answer(sdp) {
    await pc.setRemoteDescription({ type: "offer", sdp });
    return describe(await pc.createAnswer());
  },

  async accept(sdp) {
    await pc.setRemoteDescription({ type: "answer", sdp });
  },

  opened: () => opened,

  send(messages) {
    for (const message of messages) channel.send(message);
  },

  receive: (count) => inbox.take(count),
});
