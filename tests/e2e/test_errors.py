"""What a client does wrong is told to it: the code, the field, the value, the limit."""

import grpc
import pytest
from google.protobuf import duration_pb2

from client import TIMEOUT, chat_request, details, error_of, pb, user, violations

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def refused(daemon, request):
    """The error of StreamChat; the unary Chat gives the same."""
    streamed = error_of(lambda: daemon.stub.StreamChat(request, timeout=TIMEOUT))
    unary = error_of(lambda: daemon.stub.Chat(request, timeout=TIMEOUT))
    assert (streamed.code(), streamed.details()) == (unary.code(), unary.details())
    info = details(streamed)['ErrorInfo']
    assert info.domain == 'latentd' and info.reason == info.reason.upper() and info.reason
    return streamed


@pytest.mark.parametrize('field, change', [
    ('sampling.temperature', dict(sampling=pb.Sampling(temperature=2.5))),
    ('sampling.temperature', dict(sampling=pb.Sampling(temperature=float('nan')))),
    ('sampling.top_p', dict(sampling=pb.Sampling(top_p=0))),
    ('sampling.top_p', dict(sampling=pb.Sampling(top_p=1.5))),
    ('sampling.top_k', dict(sampling=pb.Sampling(top_k=0))),
    ('sampling.min_p', dict(sampling=pb.Sampling(min_p=-0.1))),
    ('limits.max_tokens', dict(limits=pb.Limits(max_tokens=0))),
    ('limits.min_tokens', dict(limits=pb.Limits(min_tokens=-1))),
    ('limits.min_tokens', dict(limits=pb.Limits(min_tokens=5, max_tokens=4))),
    ('limits.stop', dict(limits=pb.Limits(stop=['x'] * 17))),
    ('limits.stop[0]', dict(limits=pb.Limits(stop=['']))),
    ('limits.stop[1]', dict(limits=pb.Limits(stop=['ok', 'x' * 257]))),
    ('limits.stop_token_ids[0]', dict(limits=pb.Limits(stop_token_ids=[4096]))),
    ('serving.priority', dict(serving=pb.Serving(priority=1001))),
    ('serving.request_id', dict(serving=pb.Serving(request_id='x' * 129))),
    ('serving.queue_timeout', dict(serving=pb.Serving(queue_timeout=duration_pb2.Duration(seconds=-1)))),
])
def test_a_value_out_of_range_is_refused_by_name(daemon, field, change):
    error = refused(daemon, pb.ChatRequest(messages=[user('Hi')], **change))
    assert error.code() == INVALID
    assert field in violations(error), violations(error)
    assert violations(error)[field], 'says what is allowed'


def test_all_offending_fields_are_told_at_once(daemon):
    error = refused(daemon, pb.ChatRequest(messages=[user('Hi')], sampling=pb.Sampling(temperature=3, top_p=2), limits=pb.Limits(max_tokens=-1)))
    assert {'sampling.temperature', 'sampling.top_p', 'limits.max_tokens'} <= violations(error).keys()
    assert '3' in violations(error)['sampling.temperature'] and '2' in violations(error)['sampling.temperature'], 'value and limit'


@pytest.mark.parametrize('field, messages', [
    ('messages', []),
    ('messages[0].role', [pb.Message(content='Hi')]),
    ('messages[0].content', [pb.Message(role=pb.ROLE_USER)]),
    ('messages[1].role', [user('Hi'), pb.Message(role=99, content='x')]),
])
def test_messages(daemon, field, messages):
    error = refused(daemon, pb.ChatRequest(messages=messages))
    assert error.code() == INVALID
    assert field in violations(error), violations(error)


def test_a_prompt_that_is_too_long(daemon):
    error = refused(daemon, chat_request('word ' * 9000))
    assert error.code() == INVALID
    assert 'tokens' in error.details() and '819' in error.details() and details(error)['ErrorInfo'].metadata


def test_an_unknown_model(daemon):
    error = refused(daemon, chat_request('Hi', model='gpt-9'))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert 'gpt-9' in error.details() and 'demo-model' in error.details()
    error = error_of(lambda: daemon.stub.GetModel(pb.GetModelRequest(model='gpt-9'), timeout=TIMEOUT))
    assert error.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize('field, change', [
    ('response_format', dict(response_format=pb.ResponseFormat(regex='a+'))),
])
def test_a_field_that_is_not_served_yet_is_named(daemon, field, change):
    error = refused(daemon, chat_request('Hi', **change))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    assert field in error.details()


def test_a_template_of_the_request_needs_permission(daemon):
    error = refused(daemon, chat_request('Hi', chat_template='{{ messages[0].content }}'))
    assert error.code() == grpc.StatusCode.PERMISSION_DENIED


def test_template_errors_are_the_clients(daemon):
    # The demo model's template cannot continue a conversation whose last message is a user's.
    error = refused(daemon, chat_request('Hi', continue_final_message=True))
    assert error.code() == INVALID


def test_complete_needs_a_prompt(daemon):
    for request in (pb.CompleteRequest(), pb.CompleteRequest(tokens=pb.Tokens()), pb.CompleteRequest(tokens=pb.Tokens(ids=[4096])),
                    pb.CompleteRequest(tokens=pb.Tokens(ids=[-1]))):
        error = error_of(lambda: daemon.stub.Complete(request, timeout=TIMEOUT))
        assert error.code() == INVALID and violations(error)


def test_detokenize_refuses_unknown_tokens(daemon):
    error = error_of(lambda: daemon.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 4096]), timeout=TIMEOUT))
    assert error.code() == INVALID and 'token_ids[1]' in violations(error)


def test_a_message_that_is_too_large(daemon):
    error = error_of(lambda: daemon.stub.Tokenize(pb.TokenizeRequest(text='x' * (17 << 20)), timeout=TIMEOUT))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_unknown_method(daemon):
    call = daemon.channel.unary_unary('/latentd.v1.InferenceService/Sing')
    assert error_of(lambda: call(b'', timeout=TIMEOUT)).code() == grpc.StatusCode.UNIMPLEMENTED


def test_bytes_that_are_no_message(daemon):
    call = daemon.channel.unary_unary('/latentd.v1.InferenceService/Chat')
    assert error_of(lambda: call(b'\xff\xff\xff\xff', timeout=TIMEOUT)).code() in (grpc.StatusCode.INTERNAL, INVALID)


def test_a_client_that_does_not_speak_http2(daemon):
    import socket
    with socket.create_connection(tuple(daemon.address.split(':')), timeout=TIMEOUT) as s:
        s.sendall(b'GET / HTTP/1.1\r\nHost: x\r\n\r\n')
        s.settimeout(TIMEOUT)
        while s.recv(4096):
            pass
    assert daemon.check()
