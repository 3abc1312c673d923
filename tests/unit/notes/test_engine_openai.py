"""The openai engine against a real HTTP server that is slow, full, broken, silent or stubborn."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from dermfm.config import InputError, to_yaml
from dermfm.notes.engines.openai import OpenAIEngine, _retry_after
from dermfm.notes.engines.protocol import EngineConfig, Request, ServerConfig, prepare_engine
from dermfm.notes.write import generate_surely

KEY = "sk-a-very-secret-key"
SCHEMA = {"type": "object", "properties": {"border": {"enum": ["sharp", "indistinct"]}}}


class Server:
    """An OpenAI-compatible server. `script(number, body)` gives (status, headers, text) or "hang" of a POST."""

    def __init__(self):
        self.bodies, self.times, self.keys, self.busy, self.most_busy = [], [], [], 0, 0
        self.script = lambda number, body: answer(f"note {body['messages'][-1]['content']}")
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.models = (200, json.dumps({"data": [{"id": "meditron"}, {"id": "gemma"}]}))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.keys.append(self.headers["Authorization"])
                self.reply(outer.models[0], {}, outer.models[1])

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.times.append(time.monotonic())
                    outer.keys.append(self.headers["Authorization"])
                    outer.busy += 1
                    outer.most_busy = max(outer.busy, outer.most_busy)
                found = outer.script(number, body)
                with outer.lock:
                    outer.busy -= 1
                if found == "hang":
                    outer.stop.wait(30)
                    self.close_connection = True
                    return
                self.reply(*found)

            def reply(self, status, headers, text):
                data = text.encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.stop.set()
        self.http.shutdown()
        self.http.server_close()


def answer(text, reason="stop", refusal=None):
    message = {"role": "assistant", "content": text, "refusal": refusal}
    usage = {"completion_tokens": 7, "prompt_tokens": 5, "total_tokens": 12}
    return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": reason}], "usage": usage})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NOTES_KEY", KEY)
    found = Server()
    yield found
    found.close()


def config(server, **keys):
    keys = {"longest_pause_s": 0.02, **keys}
    return EngineConfig(
        kind="openai", model="gemma", server=ServerConfig(url=server.url, key_variable="NOTES_KEY", **keys)
    )


def asked(count=1, **more):
    return [Request((("system", "s"), ("user", str(k))), 1, "", k, **more) for k in range(count)]


def test_requests_go_out_together_and_answers_keep_their_order(server):
    def slow(number, body):
        time.sleep(0.05 * (number % 3))
        return answer(f"note {body['messages'][-1]['content']}")

    server.script = slow
    found = OpenAIEngine(config(server, concurrency=4)).generate(asked(12))
    assert [g.text for g in found] == [f"note {k}" for k in range(12)]
    assert all(g.num_tokens == 7 and g.finished for g in found)
    assert 1 < server.most_busy <= 4
    assert {b["seed"] for b in server.bodies} != {server.bodies[0]["seed"]}
    assert set(server.keys) == {f"Bearer {KEY}"}


FAULTS = {
    "a full server": lambda: (429, {"Retry-After": "0"}, '{"error": {"message": "slow down"}}'),
    "an error of the server": lambda: (500, {}, "oops"),
    "half an answer": lambda: (200, {}, answer("note")[2][:40]),
    "a body cut off": lambda: (200, {"Content-Length": "9999", "Connection": "close"}, "{"),
    "another API": lambda: (200, {}, '{"hello": "world"}'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_by_itself_is_asked_for_again(server, fault):
    server.script = lambda number, body: FAULTS[fault]() if number < 2 else answer("at last")
    engine = OpenAIEngine(config(server, timeout_s=20.0 if fault != "a body cut off" else 1.0))
    assert [g.text for g in engine.generate(asked())] == ["at last"]
    assert len(server.bodies) == 3


def test_a_server_that_hangs_costs_its_timeout_and_a_try(server):
    server.script = lambda number, body: "hang" if number == 0 else answer("at last")
    (found,) = OpenAIEngine(config(server, timeout_s=1.0)).generate(asked())
    assert found.text == "at last"


def test_after_the_last_try_the_request_has_its_error_and_the_others_have_their_notes(server):
    bad = lambda body: body["messages"][-1]["content"] == "2"  # noqa: E731
    server.script = lambda number, body: (503, {}, "full") if bad(body) else answer("fine")
    found = OpenAIEngine(config(server, tries=3)).generate(asked(5))
    assert [g.error for g in found] == [None, None, "503 full", None, None]
    assert sum(bad(b) for b in server.bodies) == 3


def test_retry_after_is_waited_for(server):
    server.script = lambda number, body: (429, {"Retry-After": "0.4"}, "") if number == 0 else answer("now")
    OpenAIEngine(config(server, longest_pause_s=5.0)).generate(asked())
    assert server.times[1] - server.times[0] >= 0.4
    assert 50 < _retry_after(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))) <= 60
    assert _retry_after("soon") == 0


def test_what_the_server_will_never_answer_is_asked_once_and_the_key_is_not_repeated(server):
    server.script = lambda number, body: (400, {}, json.dumps({"error": {"message": f"bad key {KEY}"}}))
    (found,) = OpenAIEngine(config(server)).generate(asked())
    assert found.error == "400 bad key ***"
    assert len(server.bodies) == 1


def test_the_key_is_in_no_configuration_and_no_request(server):
    OpenAIEngine(config(server)).generate(asked())
    assert KEY not in to_yaml(config(server)) + json.dumps(server.bodies)


def test_refusals_and_answers_cut_at_the_limit_are_told_apart_from_notes(server):
    answers = [answer(None, refusal="I cannot."), answer("", "content_filter"), answer("half a no", "length")]
    server.script = lambda number, body: answers[int(body["messages"][-1]["content"])]
    found = OpenAIEngine(config(server)).generate(asked(3))
    assert [(g.refused, g.finished, g.error) for g in found] == [
        (True, True, None),
        (True, True, None),
        (False, False, None),
    ]
    assert found[0].text == "I cannot."


def test_options_are_asked_for_as_a_schema_and_checked_in_the_answer(server):
    texts = ['{"border": "sharp"}', '{"border": "round"}', '{"border": ']
    reasons = ["stop", "stop", "length"]
    server.script = lambda number, body: answer(
        *[(t, r) for t, r in zip(texts, reasons, strict=True)][int(body["messages"][-1]["content"])]
    )
    good, wrong, cut = OpenAIEngine(config(server)).generate(asked(3, schema=SCHEMA))
    assert json.loads(good.text) == {"border": "sharp"}
    assert "not among the options" in wrong.error
    assert "token limit" in cut.error
    sent = server.bodies[0]["response_format"]["json_schema"]
    assert sent["strict"]
    assert sent["schema"]["additionalProperties"] is False
    assert sent["schema"]["required"] == ["border"]


def test_an_image_goes_as_a_data_url_no_larger_than_asked_for(server, tmp_path):
    Image.new("RGB", (400, 200), "red").save(tmp_path / "a.png")
    OpenAIEngine(config(server, image_side=100)).generate(asked(image=str(tmp_path / "a.png")))
    image, text = server.bodies[0]["messages"][-1]["content"]
    assert text == {"type": "text", "text": "0"}
    kind, data = image["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (100, 50)


def test_an_unreadable_image_costs_its_own_request_only(server, tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    found = OpenAIEngine(config(server)).generate([*asked(image=str(tmp_path / "a.jpg")), *asked()])
    assert "cannot be read as an image" in found[0].error
    assert found[1].error is None


@pytest.mark.parametrize("limit", [{"requests_per_minute": 240.0}, {"tokens_per_minute": 240 * 80.0}])
def test_rate_limits_hold(server, limit):
    engine = OpenAIEngine(config(server, **limit))
    engine._requests.left = engine._tokens.left = 0.0  # as in the middle of a long run
    server.script = lambda number, body: (
        200,
        {},
        json.dumps({"choices": [{"message": {"content": "n"}, "finish_reason": "stop"}]}),
    )
    began = time.monotonic()
    engine.generate(asked(4))
    assert time.monotonic() - began >= 0.95  # four of 240 a minute are a second's


@pytest.mark.parametrize(
    ("status", "text", "told"),
    [
        (401, "{}", r"key_variable: .* refuses the key in \$NOTES_KEY \(401\)"),
        (200, '{"data": [{"id": "gemma-2"}]}', "no model 'gemma'; did you mean 'gemma-2'"),
        (200, "<html>", "no OpenAI-compatible API"),
        (503, "", "answers 503"),
    ],
)
def test_a_wrong_key_model_or_address_is_told_at_the_start(server, status, text, told):
    server.models = (status, text)
    with pytest.raises(InputError, match=told) as error:
        prepare_engine(config(server))
    assert KEY not in str(error.value)


def test_a_missing_key_or_server_is_told_at_the_start(server, monkeypatch):
    assert prepare_engine(config(server)) == ""
    monkeypatch.delenv("NOTES_KEY")
    server.models = (401, "")
    with pytest.raises(InputError, match=r"wants a key; \$NOTES_KEY is not set"):
        prepare_engine(config(server))
    server.close()
    with pytest.raises(InputError, match="cannot be reached"):
        prepare_engine(config(server))


def test_a_key_that_is_refused_in_the_middle_stops_the_job_and_no_note_is_to_blame(server):
    server.script = lambda number, body: (401, {}, json.dumps({"error": {"message": f"bad key {KEY}"}}))
    with pytest.raises(InputError, match=r"refuses the key in \$NOTES_KEY \(401\)") as error:
        generate_surely(OpenAIEngine(config(server)), asked(4))
    assert KEY not in str(error.value)
