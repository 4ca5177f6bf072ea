"""RFC 8489, the wire format of STUN: bytes to messages and back. Pure and stateless.

``raw`` takes a datagram apart, ``message`` writes messages and reads them whole, ``attributes``
has one row per attribute, ``integrity`` signs and verifies, ``address`` writes addresses as
the kernel does, ``const`` names the numbers. What a message *means* is the business of
:mod:`relay.turn`.
"""
