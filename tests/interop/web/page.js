// WebRTC ends, by name. Each uses relayed candidates only. What a test calls is in `ends`.

"use strict";

const table = {};

class End {
  constructor(iceServer) {
    this.pc = new RTCPeerConnection({ iceServers: [iceServer], iceTransportPolicy: "relay" });
    this.pc.ondatachannel = ({ channel }) => this.use(channel);
    this.received = [];
    this.waiting = () => {};
    this.opened = new Promise((resolve) => (this.isOpen = resolve));
  }

  use(channel) {
    this.channel = channel;
    channel.onopen = () => this.isOpen();
    channel.onmessage = ({ data }) => {
      this.received.push(data);
      this.waiting();
    };
  }

  // The description with all candidates. In a restart they are gathered anew, from "complete" on.
  async describe(description) {
    const gathered = new Promise((resolve) => {
      this.pc.onicegatheringstatechange = () => {
        if (this.pc.iceGatheringState === "complete") resolve();
      };
    });
    await this.pc.setLocalDescription(description);
    await gathered;
    return this.pc.localDescription.sdp;
  }

  async statistics(type) {
    const report = await this.pc.getStats();
    return [...report.values()].filter((entry) => entry.type === type);
  }
}

globalThis.ends = {
  create(name, iceServer) {
    table[name] = new End(iceServer);
  },

  // Fake devices: a tone and a picture that moves.
  async addMedia(name) {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true, video: true });
    for (const track of stream.getTracks()) table[name].pc.addTrack(track, stream);
  },

  async offer(name, iceRestart) {
    const end = table[name];
    if (!end.channel) end.use(end.pc.createDataChannel("echo"));
    return end.describe(await end.pc.createOffer({ iceRestart }));
  },

  async answer(name, sdp) {
    const end = table[name];
    await end.pc.setRemoteDescription({ type: "offer", sdp });
    return end.describe(await end.pc.createAnswer());
  },

  async accept(name, sdp) {
    await table[name].pc.setRemoteDescription({ type: "answer", sdp });
  },

  async opened(name) {
    await table[name].opened;
  },

  send(name, messages) {
    for (const message of messages) table[name].channel.send(message);
  },

  // The next messages that come, so many.
  async receive(name, count) {
    const end = table[name];
    while (end.received.length < count) await new Promise((resolve) => (end.waiting = resolve));
    return end.received.splice(0, count);
  },

  // How many milliseconds two ends take from the first offer until ICE is connected at both.
  async timeConnecting(iceServer) {
    const began = performance.now();
    const [alice, bob] = [new End(iceServer), new End(iceServer)];
    const connected = [alice, bob].map(
      ({ pc }) =>
        new Promise((resolve) => {
          pc.oniceconnectionstatechange = () => {
            if (["connected", "completed"].includes(pc.iceConnectionState)) resolve();
          };
        }),
    );
    alice.pc.onicecandidate = ({ candidate }) => bob.pc.addIceCandidate(candidate);
    bob.pc.onicecandidate = ({ candidate }) => alice.pc.addIceCandidate(candidate);
    alice.pc.createDataChannel("data");
    await alice.pc.setLocalDescription();
    await bob.pc.setRemoteDescription(alice.pc.localDescription);
    await bob.pc.setLocalDescription();
    await alice.pc.setRemoteDescription(bob.pc.localDescription);
    await Promise.all(connected);
    const took = performance.now() - began;
    alice.pc.close();
    bob.pc.close();
    return took;
  },

  // The types of the two candidates that data flows between.
  async pair(name) {
    const [local, remote] = await this.candidates(name);
    return [local.candidateType, remote.candidateType];
  },

  // Over which protocol the relay of an end is reached: udp, tcp or tls.
  async relayProtocol(name) {
    return (await this.candidates(name))[0].relayProtocol;
  },

  // The two candidates that data flows between.
  async candidates(name) {
    const end = table[name];
    const [transport] = await end.statistics("transport");
    const pairs = await end.statistics("candidate-pair");
    const selected = pairs.find(
      ({ id, selected }) => selected || id === transport?.selectedCandidatePairId,
    );
    const candidates = [
      ...(await end.statistics("local-candidate")),
      ...(await end.statistics("remote-candidate")),
    ];
    return [selected.localCandidateId, selected.remoteCandidateId].map((wanted) =>
      candidates.find(({ id }) => id === wanted),
    );
  },

  // Waits until so many pictures were decoded, and as many packets of sound have come, from now on.
  async media(name, count) {
    const end = table[name];
    const numbers = async () => {
      const found = { pictures: 0, sound: 0 };
      for (const entry of await end.statistics("inbound-rtp")) {
        if (entry.kind === "video") found.pictures += entry.framesDecoded ?? 0;
        else found.sound += entry.packetsReceived ?? 0;
      }
      return found;
    };
    const before = await numbers();
    for (;;) {
      const now = await numbers();
      if (now.pictures >= before.pictures + count && now.sound >= before.sound + count) return;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  },

  // Other credentials, for an ICE restart.
  configure(name, iceServer) {
    table[name].pc.setConfiguration({ iceServers: [iceServer], iceTransportPolicy: "relay" });
  },

  close(name) {
    table[name].pc.close();
    delete table[name];
  },
};
