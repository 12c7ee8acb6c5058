"""A reply is seen although its wake-up went to another message."""

from __future__ import annotations

import asyncio
import time

import pytest
import zmq
import zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.session import Session

from lib.run import kernel


@pytest.fixture
def ends():
    """A kernel's socket, and the client's channel to it."""
    context, session = zmq.Context(), Session(key=b"")
    kernel_side = context.socket(zmq.ROUTER)
    port = kernel_side.bind_to_random_port("tcp://127.0.0.1")
    own = zmq.asyncio.Context()
    client_side = own.socket(zmq.DEALER)
    client_side.connect(f"tcp://127.0.0.1:{port}")
    yield kernel_side, AsyncZMQSocketChannel(client_side, session), session
    context.destroy(linger=0)
    own.destroy(linger=0)


async def replied(kernel_side, channel, session, limit_s):
    """Wait for the reply; a widget sends between its arrival and the next turn of the loop."""
    channel.send(session.msg("execute_request"))
    who, request = session.recv(kernel_side, mode=0)
    reply = asyncio.ensure_future(channel.get_msg(timeout=None))
    await asyncio.sleep(0.1)  # it sleeps on the socket
    session.send(kernel_side, "execute_reply", parent=request, ident=who)
    time.sleep(0.2)  # the reply is there, and the loop has not turned
    channel.send(session.msg("comm_msg"))
    return (await asyncio.wait_for(reply, limit_s))["msg_type"]


def test_a_send_can_take_the_wake_up_of_a_reply(ends):
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(replied(*ends, 2.0))


def test_the_reply_is_seen_all_the_same(ends, monkeypatch):
    monkeypatch.setattr(kernel, "LOOK_S", 0.1)
    kernel.look_again(ends[1])
    assert asyncio.run(replied(*ends, 10.0)) == "execute_reply"
