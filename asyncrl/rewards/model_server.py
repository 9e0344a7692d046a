"""A reward model behind HTTP: `python -m asyncrl.rewards.model_server FOLDER [--port N]`, on 127.0.0.1 only.

It answers the `/classify` of vLLM 0.32 with a Hugging Face sequence-classification model:

    POST /classify   {"input": TEXT or [TEXT, ...]} or {"messages": [...]}, "use_activation": true or false
                     -> {"data": [{"index", "label", "probs", "num_classes"}, ...], ...}
    GET /health      200 while scoring moves on, 503 when a text has waited for too long

Texts are never cut: one that is too long is the client's error. Requests that come together are scored together. The
generator that starts a server (`rewards.servers`) hands it a socket that listens already, and a line on stdout tells it
that the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from asyncrl.host.processes import tie_to_parent

log = logging.getLogger(__name__)

READY = b"ready\n"
MAX_BODY_BYTES = 4 * 2**20
MAX_WAITING = 1024  # texts
MAX_TEXTS = 64  # in one request
ANSWER_TIMEOUT_S = 60.0
WEDGED_S = 30.0  # a text that has waited for this long: scoring does not move on
MAX_FAILURES = 3  # batches in a row; then the process ends, because a broken device does not heal


class Scorer:
    """A sequence-classification model and its tokenizer. Not for two threads at once, except for `encode`.

    device: "auto", "cpu" or "cuda". threads: of torch. batch_size: texts of one forward pass at most.
    """

    def __init__(self, folder: str, device: str = "auto", threads: int = 1, batch_size: int = 16):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._torch = torch
        torch.set_num_threads(threads)
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        dtype = torch.float32 if self._device == "cpu" else torch.bfloat16
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        self._model = model.to(self._device).eval()
        config = model.config
        self.labels = {int(index): str(label) for index, label in (config.id2label or {}).items()}
        self.num_labels = config.num_labels
        self._max_length = getattr(config, "max_position_embeddings", None) or sys.maxsize
        padding = self._tokenizer.pad_token_id
        num_embeddings = model.get_input_embeddings().num_embeddings
        # A padding token beyond the embeddings was made up by transformers.
        if config.pad_token_id is None and padding is not None and padding < num_embeddings:
            config.pad_token_id = padding
        # These models score the last token that is no padding. Where no token is padding, no text can be padded.
        self.batch_size = 1 if config.pad_token_id is None else batch_size

    def encode(self, request: dict[str, Any]) -> list[list[int]]:
        """Token ids of each text of a request. Raises ValueError for what cannot be scored."""
        texts = request.get("input")
        messages = request.get("messages")
        sequences: list[list[int]]
        if messages is not None:
            if self._tokenizer.chat_template is None:
                raise ValueError("the reward model's tokenizer has no chat template; send `input`")
            # One conversation gives one list of tokens; the library's type is that of batches too.
            tokens: Any = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            sequences = [[int(token) for token in tokens]]
        else:
            texts = [texts] if isinstance(texts, str) else texts
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError("`input` must be a text or a list of texts")
            sequences = [self._tokenizer(text)["input_ids"] for text in texts]
        if not 1 <= len(sequences) <= MAX_TEXTS:
            raise ValueError(f"{len(sequences)} texts; a request has 1 to {MAX_TEXTS}")
        lengths = [len(sequence) for sequence in sequences]
        if not 1 <= min(lengths) <= max(lengths) <= self._max_length:
            raise ValueError(f"texts of {lengths} tokens; this model takes 1 to {self._max_length}")
        return sequences

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Raw scores [sequences][labels], in one forward pass."""
        torch = self._torch
        longest = max(map(len, sequences))
        padding = self._model.config.pad_token_id or 0
        padded = [sequence + [padding] * (longest - len(sequence)) for sequence in sequences]
        used = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor(padded, device=self._device),
                attention_mask=torch.tensor(used, device=self._device),
            )
        scores: list[list[float]] = output.logits.float().cpu().tolist()
        return scores

    def activated(self, scores: list[float]) -> list[float]:
        """Probabilities: sigmoid of a single score, softmax of several."""
        values = self._torch.tensor(scores, dtype=self._torch.float64)
        probabilities: list[float] = (values.sigmoid() if len(scores) == 1 else values.softmax(0)).tolist()
        return probabilities


class Batcher:
    """Scores what comes in, in order, as many texts at once as are waiting (at most the scorer's batch size)."""

    def __init__(self, scorer: Scorer):
        self._scorer = scorer
        self._waiting: queue.Queue[tuple[list[int], Future[list[float]]]] = queue.Queue(MAX_WAITING)
        self._busy_since: float | None = None
        threading.Thread(target=self._run, name="scoring", daemon=True).start()

    def submit(self, sequence: list[int]) -> Future[list[float]]:
        """Raises queue.Full when too much is waiting."""
        future: Future[list[float]] = Future()
        self._waiting.put_nowait((sequence, future))
        return future

    @property
    def wedged(self) -> bool:
        """Whether a batch has been under way for far too long."""
        since = self._busy_since
        return since is not None and time.monotonic() - since > WEDGED_S

    def _run(self) -> None:
        failures = 0
        while failures < MAX_FAILURES:
            batch = self._next_batch()
            self._busy_since = time.monotonic()
            try:
                scores = self._scorer.score([sequence for sequence, _ in batch])
                failures = 0
            except Exception as error:
                log.exception("a batch of %d texts could not be scored", len(batch))
                failures += 1
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), score in zip(batch, scores, strict=True):
                    future.set_result(score)
            self._busy_since = None
        log.error("%d batches in a row could not be scored; ending", failures)
        os._exit(1)

    def _next_batch(self) -> list[tuple[list[int], Future[list[float]]]]:
        batch = [self._waiting.get()]
        while len(batch) < self._scorer.batch_size:
            try:
                batch.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        return batch


class Server(ThreadingHTTPServer):
    """The socket, listening already, and what its requests need."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, name: str, scorer: Scorer):
        super().__init__(listening.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.name = name
        self.scorer = scorer
        self.batcher = Batcher(scorer)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are no news; anything else is a defect and is logged."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            log.error("a request failed", exc_info=sys.exception())


class Handler(BaseHTTPRequestHandler):
    """One connection; several requests may follow each other on it."""

    protocol_version = "HTTP/1.1"
    timeout = ANSWER_TIMEOUT_S
    server: Server

    def do_GET(self) -> None:
        """`/health`."""
        if self.path != "/health":
            self._refuse(404, f"there is no {self.path}")
        elif self.server.batcher.wedged:
            self._refuse(503, f"a batch has been under way for more than {WEDGED_S:g} s")
        else:
            self._answer(200, {})

    def do_POST(self) -> None:
        """`/classify`."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > MAX_BODY_BYTES:
            self.close_connection = True  # what follows is not read
            self._refuse(413, f"a request has a Content-Length of at most {MAX_BODY_BYTES}")
            return
        body = self.rfile.read(int(length))
        if self.path != "/classify":
            self._refuse(404, f"there is no {self.path}")
            return
        try:
            request = json.loads(body)
            sequences = self.server.scorer.encode(request)
        except Exception as error:  # noqa: BLE001 - of JSON, template or tokenizer: it is the request that is wrong
            self._refuse(400, f"{type(error).__name__}: {error}")
            return
        self._classify(sequences, request.get("use_activation") is not False)

    def _classify(self, sequences: list[list[int]], activation: bool) -> None:
        try:
            futures = [self.server.batcher.submit(sequence) for sequence in sequences]
            scores = [future.result(ANSWER_TIMEOUT_S) for future in futures]
        except queue.Full:
            self._refuse(503, f"{MAX_WAITING} texts are waiting already")
        except FutureTimeout:
            self._refuse(503, f"not scored within {ANSWER_TIMEOUT_S:g} s")
        except Exception as error:  # noqa: BLE001 - what the model raised
            self._refuse(500, f"{type(error).__name__}: {error}")
        else:
            self._answer(200, self._response(sequences, scores, activation))

    def _response(self, sequences: list[list[int]], scores: list[list[float]], activation: bool) -> dict[str, Any]:
        tokens = sum(map(len, sequences))
        data = [
            {
                "index": index,
                "label": self.server.scorer.labels.get(max(range(len(row)), key=row.__getitem__)),
                "probs": self.server.scorer.activated(row) if activation else row,
                "num_classes": len(row),
            }
            for index, row in enumerate(scores)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "created": int(time.time()), "model": self.server.name, "data": data, "usage": usage}

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, {"error": {"message": message[:1000], "code": status}})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        try:
            body = json.dumps(content, allow_nan=False).encode()
        except ValueError:
            status, body = 500, b'{"error": {"message": "a score is not finite", "code": 500}}'
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a line per reward would bury what matters."""


def main() -> None:
    """Serves until it is ended; with --fd it also ends with the process that started it."""
    parser = argparse.ArgumentParser(prog="python -m asyncrl.rewards.model_server", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", help="of a Hugging Face sequence-classification model")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; default: a free one, which is printed")
    parser.add_argument("--fd", type=int, default=None, help="a socket that listens already, in place of --port")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level="INFO")
    if arguments.fd is None:
        listening = socket.create_server(("127.0.0.1", arguments.port))
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    else:
        if not tie_to_parent():
            return
        listening = socket.socket(fileno=arguments.fd)
    ready = os.dup(1)
    os.dup2(2, 1)  # libraries that print must not be taken for us
    scorer = Scorer(arguments.folder, arguments.device, arguments.threads, arguments.batch_size)
    server = Server(listening, arguments.folder, scorer)
    os.write(ready, READY)
    server.serve_forever()


if __name__ == "__main__":
    main()
