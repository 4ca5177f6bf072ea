// A WebRTC end by pion, called by JSON lines: see ../program.py. Relayed candidates only.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	"github.com/pion/webrtc/v4"
)

type call struct {
	ID        int               `json:"id"`
	Call      string            `json:"call"`
	Arguments []json.RawMessage `json:"arguments"`
}

type end struct {
	pc       *webrtc.PeerConnection
	channel  *webrtc.DataChannel
	opened   chan struct{}
	received chan string
}

func main() {
	var server struct{ Urls, Username, Credential string }
	check(json.Unmarshal([]byte(os.Args[1]), &server))
	pc, err := webrtc.NewPeerConnection(webrtc.Configuration{
		ICEServers: []webrtc.ICEServer{{
			URLs:       []string{server.Urls},
			Username:   server.Username,
			Credential: server.Credential,
		}},
		ICETransportPolicy: webrtc.ICETransportPolicyRelay,
	})
	check(err)
	e := &end{pc: pc, opened: make(chan struct{}), received: make(chan string, 10000)}
	pc.OnDataChannel(e.use)
	say(map[string]any{"id": 0, "result": "pion"})
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var c call
		check(json.Unmarshal(lines.Bytes(), &c))
		if result, err := e.serve(c); err != nil {
			say(map[string]any{"id": c.ID, "error": err.Error()})
		} else {
			say(map[string]any{"id": c.ID, "result": result})
		}
	}
	check(pc.Close())
}

func (e *end) use(channel *webrtc.DataChannel) {
	e.channel = channel
	channel.OnOpen(func() { close(e.opened) })
	channel.OnMessage(func(message webrtc.DataChannelMessage) { e.received <- string(message.Data) })
}

func (e *end) serve(c call) (any, error) {
	switch c.Call {
	case "offer":
		channel, err := e.pc.CreateDataChannel("data", nil)
		if err != nil {
			return nil, err
		}
		e.use(channel)
		offer, err := e.pc.CreateOffer(nil)
		if err != nil {
			return nil, err
		}
		return e.describe(offer)
	case "answer":
		if err := e.hear(webrtc.SDPTypeOffer, c.Arguments[0]); err != nil {
			return nil, err
		}
		answer, err := e.pc.CreateAnswer(nil)
		if err != nil {
			return nil, err
		}
		return e.describe(answer)
	case "accept":
		return nil, e.hear(webrtc.SDPTypeAnswer, c.Arguments[0])
	case "opened":
		<-e.opened
		return nil, nil
	case "send":
		var messages []string
		check(json.Unmarshal(c.Arguments[0], &messages))
		for _, message := range messages {
			if err := e.channel.SendText(message); err != nil {
				return nil, err
			}
		}
		return nil, nil
	case "receive":
		var count int
		check(json.Unmarshal(c.Arguments[0], &count))
		messages := make([]string, count)
		for i := range messages {
			messages[i] = <-e.received
		}
		return messages, nil
	case "pair":
		pair, err := e.pc.SCTP().Transport().ICETransport().GetSelectedCandidatePair()
		if err != nil {
			return nil, err
		}
		return []string{pair.Local.Typ.String(), pair.Remote.Typ.String()}, nil
	}
	return nil, fmt.Errorf("unknown call %q", c.Call)
}

func (e *end) describe(description webrtc.SessionDescription) (any, error) {
	gathered := webrtc.GatheringCompletePromise(e.pc)
	if err := e.pc.SetLocalDescription(description); err != nil {
		return nil, err
	}
	<-gathered
	return e.pc.LocalDescription().SDP, nil
}

func (e *end) hear(kind webrtc.SDPType, raw json.RawMessage) error {
	var sdp string
	check(json.Unmarshal(raw, &sdp))
	return e.pc.SetRemoteDescription(webrtc.SessionDescription{Type: kind, SDP: sdp})
}

func say(message map[string]any) {
	line, err := json.Marshal(message)
	check(err)
	fmt.Println(string(line))
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
