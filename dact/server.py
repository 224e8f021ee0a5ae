"""A server for a fitted model: LitServe around `TextClassifier`, with requests batched together."""

# Annotations are evaluated here, since LitServe reads the types of requests and responses from
# them.

import errno
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from queue import Empty
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from dact.checks import check_choice, check_count, check_range
from dact.encoders.base import LayeredEncoder
from dact.text_classifier import Prediction, TextClassifier, check_text

try:
    import litserve
    from fastapi import HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from litserve.loops import BatchedLoop
except ImportError as error:
    raise ImportError(
        "dact serve needs LitServe, which is not installed: pip install 'dact[serve]'"
    ) from error

MOST_CHARACTERS = 100_000  # of a text; a pair counts as one
MOST_BYTES = 1_000_000  # of a body
MOST_TEXTS = 10_000  # of a request, since other clients wait for it
Host = Literal["127.0.0.1", "0.0.0.0", "::"]  # those that LitServe takes

# LitServe ends its worker by a signal. Python's resource tracker, a process that is started with
# these options, then frees a semaphore of the worker, and would say so.
ITS_SEMAPHORE = "ignore:resource_tracker:UserWarning"

log = logging.getLogger(__name__)

Text = str | tuple[str, str]


class PredictRequest(BaseModel):
    """The body of ``POST /predict``: one text, or a list of them; a pair of texts is a list of
    two."""

    model_config = ConfigDict(extra="forbid")
    text: Text | None = None
    texts: list[Text] | None = None

    @field_validator("text", "texts", mode="before")
    @classmethod
    def _limit(cls, value: Any, field: ValidationInfo) -> Any:
        many = value if isinstance(value, list) and field.field_name == "texts" else [value]
        # Not a validation error, whose status is 422: size has a status of its own.
        if len(many) > MOST_TEXTS:
            raise HTTPException(413, f"at most {MOST_TEXTS} texts in a request, got {len(many)}")
        for text in many:
            parts = text if isinstance(text, list) else [text]
            if sum(len(part) for part in parts if isinstance(part, str)) > MOST_CHARACTERS:
                raise HTTPException(413, f"a text has at most {MOST_CHARACTERS} characters")
        return value

    @model_validator(mode="before")
    @classmethod
    def _name(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            raise ValueError(
                'expected an object such as {"text": "…"}, sent with Content-Type: application/json'
            )
        unknown = [name for name in content if name not in cls.model_fields]
        if unknown:
            raise ValueError(f"expected 'text' or 'texts', got {str(unknown[0])[:40]!r}")
        return content

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.text is None) == (self.texts is None):
            raise ValueError("expected either 'text' or 'texts'")
        if not self.all():
            raise ValueError("expected at least one text")
        for position, text in enumerate(self.all()):
            check_text(text, position)
        return self

    def all(self) -> list[Text]:
        """Return the texts of the request, in their order."""
        return [self.text] if self.text is not None else self.texts or []


class Answer(BaseModel):
    """The answer for one text; see `dact.text_classifier.Prediction`."""

    label: str
    score: float
    exit_layer: int


class PredictResponse(BaseModel):
    """The answers for the texts of a request, in their order."""

    predictions: list[Answer]


class _Loop(BatchedLoop):
    """A loop that waits for the first request of a batch; LitServe's own polls a thousand times a
    second."""

    def get_batch_requests(
        self, lit_api: Any, request_queue: Any, transport: Any
    ) -> tuple[list[Any], list[Any]]:
        """Return the requests to answer together, and those that waited for longer than the
        server's time-out."""
        taken: list[Any] = []
        end = None
        while len(taken) < lit_api.max_batch_size:
            left = 1.0 if end is None else max(0.0, end - time.monotonic())
            try:
                taken.append(request_queue.get(left > 0, left))
            except Empty:
                break
            end = end or time.monotonic() + lit_api.batch_timeout
        late = time.monotonic() - lit_api.request_timeout
        return (
            [(queue, uid, request) for queue, uid, came, request in taken if came >= late],
            [(queue, uid) for queue, uid, came, _ in taken if came < late],
        )


class _API(litserve.LitAPI):
    """The API that LitServe runs: a classifier in the process that calls `setup`."""

    def __init__(self, model: str, max_batch: int, max_wait: float) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=max_wait, loop=_Loop())
        self.model = model

    def setup(self, device: str) -> None:
        # Ctrl-C reaches every process of the terminal. This one ends when the server has answered
        # accepted requests.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.classifier = TextClassifier.from_pretrained(self.model)
        self.classifier.model.to(device)
        with warnings.catch_warnings(action="ignore"):  # a tokenizer may know none of these words
            self.classifier(["warm up"])

    def decode_request(self, request: PredictRequest) -> PredictRequest:
        return request

    def predict(self, requests: list[PredictRequest]) -> list[Any]:
        try:
            return self._classify(requests)
        except Exception as error:
            if len(requests) == 1:
                log.error(
                    "a request failed: %s", type(error).__name__
                )  # the message may quote the text
                return [JSONResponse({"detail": "the model failed on this request"}, 500)]
            # One of them is at fault: classify them one by one, so that the others are answered.
            return [answer for request in requests for answer in self.predict([request])]

    def encode_response(self, output: Any) -> PredictResponse:
        return output

    def _classify(self, requests: list[PredictRequest]) -> list[Any]:
        texts = [text for request in requests for text in request.all()]
        found: dict[int, Prediction] = {}
        for kind in (str, tuple):  # single texts and pairs are tokenised in different ways
            rows = [row for row, text in enumerate(texts) if isinstance(text, kind)]
            if rows:
                answers = self.classifier.stream(texts[row] for row in rows)  # type: ignore[misc]
                found.update(zip(rows, answers, strict=True))
        in_order = (
            {name: getattr(found[row], name) for name in Answer.model_fields}
            for row in range(len(texts))
        )
        return [{"predictions": [next(in_order) for _ in request.all()]} for request in requests]


def serve(
    model: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_batch: int = 64,
    max_wait: float = 0.002,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C. Requests that were accepted before are still answered.
    The call blocks.

    Routes: ``POST /predict`` takes ``{"text": …}`` or ``{"texts": […]}`` (a pair of texts is a list
    of two) and answers ``{"predictions": [{"label", "score", "exit_layer"}, …]}``; ``GET /health``
    says whether the model is loaded; ``GET /info`` has the classes, layers, dial and promise. A
    malformed, empty or mistyped request gets 422. A text of over 100,000 characters, more than
    10,000 texts or a body of over 1 MB gets 413. If the environment sets LIT_SERVER_API_KEY,
    requests must carry it in the header ``X-API-Key``. Texts are not logged.

    Call it in the main thread of a program of its own, since it starts processes and handles
    SIGTERM.

    Args:
        model: Folder of the model, as ``dact fit``, ``dact tune`` and ``dact export`` write it.
        host: Address to listen on, ``"127.0.0.1"``, ``"0.0.0.0"`` or ``"::"``; only this machine
            reaches the first.
        port: Port to listen on, 1024 to 65535.
        max_batch: Largest number of requests that are classified together, 2 or more.
        max_wait: Seconds that a request may wait for others to join it, 0 or more.

    Raises:
        ImportError: If LitServe is not installed.
        FileNotFoundError: If there is no model.
        ValueError: If an argument is outside its range, or the model cannot be read.
        OSError: If the port is taken.
        RuntimeError: If the process that runs the model or the one that answers HTTP ends by
            itself.
    """
    check_choice("serve: host", host, Host)
    check_count("serve: port", port, 1024, 65535)
    check_count("serve: max_batch", max_batch, 2)
    check_range("serve: max_wait", max_wait, "[0, 30)")
    _check_free(host, port)
    path = str(Path(model).resolve()) if Path(model).is_dir() else str(model)
    info, device = _inspect(path)
    server = _Server(
        _API(path, max_batch, max_wait),
        accelerator=device,
        model_metadata=info,
        max_payload_size=MOST_BYTES,
    )
    server.app.add_exception_handler(RequestValidationError, _say_what_is_wrong)
    server.app.add_exception_handler(400, _say_unreadable)
    before, main = set(multiprocessing.active_children()), os.getpid()

    def is_news(record: logging.LogRecord) -> bool:
        # LitServe's monitor logs that LitServe's processes are gone: they were stopped, or an error
        # is raised here.
        gone = record.exc_info is not None and isinstance(record.exc_info[1], (EOFError, OSError))
        crashed = gone and record.msg == "Monitoring worker crashed"
        return not crashed and not str(record.msg).endswith("Already not alive.")

    def stop(number: int, frame: object) -> None:
        if (
            os.getpid() != main
        ):  # a process of the server inherits this handler, and stops by itself
            raise SystemExit(0)
        server.stopping.set()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt  # at which LitServe shuts down in order

    sys.warnoptions.append(ITS_SEMAPHORE)
    handler, interrupt = signal.signal(signal.SIGTERM, stop), signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:  # and is not ignored
        signal.signal(signal.SIGINT, stop)
    logger = logging.getLogger("litserve.server")
    logger.addFilter(is_news)
    print(
        f"serving {path} at http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C stops it",
        flush=True,
    )
    try:
        server.run(
            host=host,
            port=port,
            num_api_servers=1,
            generate_client_file=False,
            access_log=False,
            log_level="warning",
        )
    except KeyboardInterrupt:
        pass  # before it was ready
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(
            "the process that runs the model ended by itself, perhaps for lack of memory"
        ) from error
    finally:
        server.stopping.set()
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, interrupt)
        sys.warnoptions.remove(ITS_SEMAPHORE)
        try:
            for thread in threading.enumerate():
                if (
                    thread.name == "litserve-monitoring"
                ):  # which looks now and then, so perhaps only now
                    thread.join(4 * server.monitor_internal)
        finally:
            logger.removeFilter(is_news)
    if server.deserted:
        raise RuntimeError("the process that answers HTTP ended by itself")


class _Server(litserve.LitServer):
    """LitServe that stops as well if the process that answers HTTP ends, which LitServe itself
    would not notice."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.monitor_internal = 0.5  # seconds between two looks at the processes
        self.stopping, self.deserted = threading.Event(), False

    def _start_worker_monitoring(self, manager: Any, uvicorn_workers: dict[int, Any]) -> None:
        """Called when all processes have been started."""
        super()._start_worker_monitoring(manager, uvicorn_workers)
        threading.Thread(
            target=self._watch, args=(list(uvicorn_workers.values()),), daemon=True
        ).start()

    def _watch(self, http: list[Any]) -> None:
        while not self.stopping.wait(self.monitor_internal):
            if not all(one.is_alive() for one in http) and all(
                one.is_alive() for one in self.inference_workers
            ):
                self.deserted = True
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _check_free(host: str, port: int) -> None:
    """Raise an error if another program listens on the port; the server would find out after the
    model is loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the server does: one that has ended is none
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise OSError(f"port {port} of {host} is in use: give another --port") from None
            raise


def _inspect(model: str) -> tuple[dict[str, Any], str]:
    """Load a model once to fail early; return the content of ``/info`` and the kind of device that
    it runs on."""
    classifier = TextClassifier.from_pretrained(model)
    fitted = classifier.model
    encoder: LayeredEncoder = fitted.encoder
    exported = type(encoder).__name__ == "OnnxEncoder"
    info = {
        "classes": list(classifier.class_names),
        "layers": fitted.num_layers,
        "halting": fitted.halting,
        "dial": {
            "halting_tolerance": fitted.halting_tolerance,
            "halting_margin": fitted.halting_margin,
        },
        "promise": fitted.calibration,
        "runs on": "ONNX Runtime" if exported else "PyTorch",
    }
    return json.loads(
        json.dumps(info)
    ), "cuda" if torch.cuda.is_available() and not exported else "cpu"


async def _say_what_is_wrong(request: Request, error: Exception) -> JSONResponse:
    """Answer 422 without the input: FastAPI would repeat it, and fail if it is not valid
    Unicode."""
    faults: Sequence[Any] = getattr(error, "errors", list)()
    return JSONResponse(
        {"detail": [{name: fault[name] for name in ("loc", "msg", "type")} for fault in faults]},
        422,
    )


async def _say_unreadable(request: Request, error: Exception) -> JSONResponse:
    """Answer 422 for a body that no parser can read, where FastAPI would answer 400 for some
    faults."""
    return JSONResponse({"detail": "the body is not JSON"}, 422)
