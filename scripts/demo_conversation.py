#!/usr/bin/env python3
"""A conversation with a running latentd, streamed: the smallest client in Python.

    .venv/bin/python scripts/demo_conversation.py 127.0.0.1:50051 ["first message" "second message" ...]

Without messages it holds the conversation of the Transformers documentation of DeepSeek-V3. The stubs are made from
proto/ by grpcio-tools; a project of its own would make them once.
"""

import pathlib
import sys
import tempfile

import grpc
import grpc_tools
from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parent.parent / 'proto'
INCLUDED = pathlib.Path(grpc_tools.__file__).parent / '_proto'  # google/protobuf/*.proto


def main(address, *messages):
    with tempfile.TemporaryDirectory() as stubs:
        protoc.main(['protoc', f'-I{PROTO}', f'-I{INCLUDED}', f'--python_out={stubs}', f'--grpc_python_out={stubs}',
                     'latentd/v1/inference.proto'])
        sys.path.insert(0, stubs)
        from latentd.v1 import inference_pb2 as pb
        from latentd.v1 import inference_pb2_grpc as pb_grpc

    # What the assistant said in its first turn is given, as the documentation has it; the rest is generated.
    history = []
    if not messages:
        history = [pb.Message(role=pb.ROLE_USER, content='Hello, how are you?'),
                   pb.Message(role=pb.ROLE_ASSISTANT, content="I'm doing great. How can I help you today?")]
        for message in history:
            print('> ' + message.content if message.role == pb.ROLE_USER else message.content)
        messages = ["I'd like to show off how chat templating works!", 'What is the KV cache?']

    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        for text in messages:
            print('>', text)
            history.append(pb.Message(role=pb.ROLE_USER, content=text))
            answer = ''
            for event in stub.StreamChat(pb.ChatRequest(messages=history, sampling=pb.Sampling(temperature=0)), timeout=60):
                if event.WhichOneof('event') == 'delta':
                    answer += event.delta.content
                    print(event.delta.content, end='', flush=True)
            print()
            history.append(pb.Message(role=pb.ROLE_ASSISTANT, content=answer))


if __name__ == '__main__':
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
