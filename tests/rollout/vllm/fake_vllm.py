"""A server that speaks vLLM's routes without vLLM, and misbehaves on demand."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FACTS = {
    "backend": "gmpo",
    "logprobs_mode": "raw_logprobs",
    "longest": 128,
    "dtype": "float32",
    "device": "cpu",
    "workers": 1,
    "takes_adapters": False,
    "max_num_seqs": 256,
}
GENERATE = "/inference/v1/generate"


class FakeVllm:
    """Answers on its own port.  `answers[path]` replaces what a path is answered with.

    An answer is a dict or list (JSON, status 200), (status, bytes), or a function of the handler
    that writes it.  `choices(fake, body)` gives the completions of a request.
    """

    def __init__(self, *, token=None, answers=None, choices=None):
        self.token = token
        self.choices = choices or FakeVllm.all_choices
        self.answers = dict(answers or {})
        self.requests = []  # (path without query, body) in order
        self.version = "default"
        self.active = False
        self.updates = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                fake._serve(self)

            do_POST = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def count(self, path):
        return sum(seen == path for seen, _ in self.requests)

    def _serve(self, handler):
        length = int(handler.headers.get("Content-Length") or 0)
        content = handler.rfile.read(length)
        path = handler.path.partition("?")[0]
        body = json.loads(content) if content else None
        self.requests.append((path, body))
        if (
            self.token
            and path != "/health"
            and handler.headers.get("Authorization") != f"Bearer {self.token}"
        ):
            return reply(handler, 401, b"{}")
        answer = self.answers.get(path)
        if answer is None:
            answer = self._answer(path, body)
        if callable(answer):
            return answer(handler)
        if path == GENERATE and body.get("stream") and isinstance(answer, dict | list):
            return stream(handler, events_of(answer))
        status, data = answer if isinstance(answer, tuple) else (200, json.dumps(answer).encode())
        return reply(handler, status, data)

    def _answer(self, path, body):
        if path == "/version":
            return {"version": "0.32.0"}
        if path == "/collective_rpc":
            return {"results": [FACTS]}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/start_weight_update":
            if self.active:
                return error(
                    500, "start_weight_update called while a weight update is already active."
                )
            self.active = True
        if path == "/update_weights":
            if "abort" in body["update_info"]:
                self.active = False
                return error(500, "The weight update was broken off")
            self.updates.append(body["update_info"])
        if path == "/finish_weight_update":
            self.active = False
        if path == GENERATE:
            return self._generate(body)
        return {"success": True}

    def _generate(self, body):
        params = body["sampling_params"]
        if params.get("prompt_logprobs") is not None:
            reports = [None, *({str(token): {"logprob": -1.0}} for token in body["token_ids"][1:])]
            return {"choices": [], "prompt_logprobs": reports}
        return {"choices": self.choices(self, body)}

    def all_choices(self, body):
        return [self.choice(number, body) for number in range(body["sampling_params"]["n"])]

    def choice(self, number, body, **changes):
        """Completion `number` of a prompt: its last token and the number, and the end."""
        ids = [body["token_ids"][-1], number, 1]
        return {
            "index": number,
            "token_ids": ids,
            "finish_reason": "stop",
            "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}],
            "logprobs": {"content": [{"token_id": token, "logprob": -0.5} for token in ids]},
            **changes,
        }


def error(status, message):
    return status, json.dumps({"error": {"message": message, "code": status}}).encode()


def reply(handler, status, data):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def events_of(answer):
    """A stream's events: of each well-formed choice the first token, and later all that follows."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        return [answer]
    begins, ends = [], []
    for choice in choices:
        ids = choice["token_ids"]
        steps = (choice.get("logprobs") or {}).get("content")
        if not (isinstance(ids, list) and isinstance(steps, list) and len(ids) == len(steps)):
            ends.append(choice)
            continue
        sets = choice.get("sampling_mask") or []
        for part, span in ((begins, slice(0, 1)), (ends, slice(1, None))):
            content = {"content": steps[span]}
            cut = {"token_ids": ids[span], "logprobs": content, "sampling_mask": sets[span]}
            part.append({**choice, **cut})
        begins[-1] |= {"finish_reason": None, "weight_versions": None}
    return [{"choices": [choice]} for choice in (*begins, *ends)]


def stream(handler, events, *, pause=0.0, end=True):
    """Write server-sent events, as vLLM does.

    Args:
        pause: Seconds before each event.
        end: Write the last event, which says that this was all.
    """
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    lines = [json.dumps(event).encode() for event in events] + [b"[DONE]"] * end
    for line in lines:
        time.sleep(pause)
        data = b"data: " + line + b"\n\n"
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        handler.wfile.flush()
    if end:
        handler.wfile.write(b"0\r\n\r\n")
    else:
        handler.close_connection = True


def silent(handler):
    """Takes the request and never answers."""
    time.sleep(30)


def dripping(handler):
    """Always about to answer: a byte now and then, each within any timeout of a single read."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def breaking_off(handler):
    """Ends the connection in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.wfile.flush()
    handler.close_connection = True
