"""Process: tokenizer. Text slots in, tokens at granted positions of the ring out.

A block is encoded into the tokenizer's own memory and reported; it is copied into the ring when
the supervisor knows its position. Meanwhile the next block is encoded.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import xxhash

from pipeline import encoding
from pipeline.channel import Channel
from pipeline.child import Descriptors
from pipeline.faults import faultpoint
from pipeline.messages import Encode, Encoded, Message, Place, Placed, TokenizerSetup
from shm import ring, segment, text


class Tokenizer:
    """Encodes blocks and places their tokens.

    Args:
        channel: To the supervisor.
        setup: First message.
        descriptors: Of both segments.
    """

    def __init__(self, channel: Channel, setup: TokenizerSetup, descriptors: Descriptors) -> None:
        self._channel = channel
        self._encoder = encoding.load(setup.encoding, setup.vocab_size)
        slots = segment.attach(descriptors.text, text.size_bytes(setup.text), writable=False)
        self._text = text.TextSlots(slots, setup.text)
        tokens = segment.attach(descriptors.ring, ring.size_bytes(setup.ring), writable=True)
        self._ring = ring.Ring(tokens, setup.ring)
        self._tokens: dict[int, np.ndarray] = {}
        self._waiting: deque[Encode] = deque()
        self._encoder.prepare()

    def run(self) -> None:
        """Serve until the supervisor hangs up: what can be placed goes before encoding."""
        while True:
            message = self._channel.receive(0 if self._waiting else None)
            if message is None:
                self._encode(self._waiting.popleft())
            else:
                self._take(message)

    def _take(self, message: Message) -> None:
        match message:
            case Encode():
                self._waiting.append(message)
            case Place():
                self._place(message)
            case _:
                raise TypeError(f"the tokenizer got {message!r}")

    def _encode(self, message: Encode) -> None:
        faultpoint("tokenizer:before_encode")
        begin = time.monotonic()
        tokens = self._encoder.encode_block(*self._text.read(message.slot))
        self._tokens[message.block] = tokens
        self._channel.send(
            Encoded(
                block=message.block,
                num_tokens=len(tokens),
                digest=xxhash.xxh3_64_intdigest(memoryview(tokens).cast("B")),
                seconds=time.monotonic() - begin,
            )
        )

    def _place(self, message: Place) -> None:
        tokens = self._tokens[message.block]
        part = tokens[message.first : message.first + message.count]
        half = len(part) // 2
        self._ring.place(message.lane, message.position, part[:half])
        faultpoint("tokenizer:mid_place")
        self._ring.place(message.lane, message.position + half, part[half:])
        faultpoint("tokenizer:after_place")
        if message.first + message.count == len(tokens):
            del self._tokens[message.block]
        self._channel.send(Placed(message.block, message.first, message.count))


def main(channel: Channel, descriptors: Descriptors) -> None:
    """Run one tokenizer."""
    setup = channel.receive()
    assert isinstance(setup, TokenizerSetup)
    Tokenizer(channel, setup, descriptors).run()
