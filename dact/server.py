"""A server for a fitted model: LitServe around `TextClassifier`, with requests batched together."""

# Without `from __future__ import annotations`, since LitServe reads the types of requests and
# responses from the annotations.

import logging
import os
import signal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dact.checks import Range, check_arguments
from dact.text_classifier import TextClassifier

try:
    import litserve
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
except ImportError as error:
    raise ImportError(
        "dact serve needs LitServe, which is not installed: pip install 'dact[serve]'"
    ) from error

MOST_CHARACTERS = 100_000  # per text, and per text of a pair
MOST_BYTES = 1_000_000  # per request body
MOST_TEXTS = 10_000  # per request, since other clients wait for it
SHOWN_FAULTS = 3
EXPECTED = 'Content-Type: application/json, and a body such as {"text": "…"} or {"texts": ["…"]}'
Host = Literal["127.0.0.1", "0.0.0.0", "::"]  # all that LitServe accepts

OneText = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Text = OneText | tuple[OneText, OneText]


class PredictRequest(BaseModel):
    """The body of ``POST /predict``: one text, or a list of them; a pair of texts is a list of
    two."""

    model_config = ConfigDict(extra="forbid")
    text: Text | None = None
    texts: Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.text is None) == (self.texts is None):
            raise ValueError("expected either 'text' or 'texts'")
        return self

    def all(self) -> list[Text]:
        """Return the texts of the request, in their order."""
        return [self.text] if self.text is not None else self.texts or []


class Answer(BaseModel):
    """The answer for one text; see `dact.text_classifier.Prediction`."""

    model_config = ConfigDict(from_attributes=True)
    label: str | None
    score: float | None
    exit_layer: int | None
    reason: str | None
    # only for models of several labels
    labels: dict[str, float] | None = None


class PredictResponse(BaseModel):
    """The answers for the texts of a request, in their order."""

    predictions: list[Answer]


class _API(litserve.LitAPI):
    """The API that LitServe runs: a classifier in the process that calls `setup`."""

    def __init__(self, model: str, max_batch: int, max_wait: float) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=max_wait)
        self.model = model

    def setup(self, device: str) -> None:
        # Ctrl-C reaches all processes of the terminal; the server ends this one.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.classifier = TextClassifier.from_pretrained(self.model, device=device)
        self.classifier("warm up")

    def decode_request(self, request: PredictRequest) -> PredictRequest:
        return request

    def predict(self, requests: list[PredictRequest]) -> list[PredictResponse]:
        texts = [text for request in requests for text in request.all()]
        answers = map(Answer.model_validate, self.classifier.stream(texts))
        return [
            PredictResponse(predictions=[next(answers) for _ in request.all()])
            for request in requests
        ]

    def encode_response(self, output: PredictResponse) -> PredictResponse:
        return output


def serve(
    model: str | Path,
    host: Host = "127.0.0.1",
    port: Annotated[int, Range("[1024, 65535]")] = 8000,
    max_batch: Annotated[int, Range("[2, inf)")] = 64,
    max_wait: Annotated[float, Range("[0, 30)")] = 0.002,
) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C. Requests that were accepted before are still
    answered.

    ``POST /predict`` takes ``{"text": …}`` or ``{"texts": […]}`` and returns ``{"predictions":
    [{"label", "score", "exit_layer", "reason"}, …]}``; ``GET /health`` tells whether the model is
    loaded; ``GET /info`` returns the classes, layers, dial and promise. If the environment variable
    LIT_SERVER_API_KEY is set, requests must carry its value in the header ``X-API-Key``.

    Call it in the main thread of a separate program: it starts processes and handles SIGTERM.

    Args:
        model: Folder of the model, as written by ``dact fit``, ``dact tune`` and ``dact export``;
            on the command line also the folder of a run, or OWNER/NAME[@REVISION] on the Hub.
        host: Address to listen on; 127.0.0.1 can be reached from this machine only.
        port: Port to listen on, 1024 to 65535.
        max_batch: Largest number of requests that are classified together, 2 or more.
        max_wait: Seconds that a request may wait for others to join it, 0 or more.

    Raises:
        ImportError: If LitServe is not installed.
        FileNotFoundError: If there is no model.
        ValueError: If an argument is outside its range, or the model cannot be read.
        OSError: If the port is taken.
    """
    check_arguments(serve, locals(), "serve: ")
    path = str(Path(model).resolve()) if Path(model).is_dir() else str(model)
    # Loaded here as well, so that a corrupted model fails before any process starts.
    info = _info(TextClassifier.from_pretrained(path))
    cuda = torch.cuda.is_available() and info["runs on"] == "PyTorch"
    server = litserve.LitServer(
        _API(path, max_batch, max_wait),
        accelerator="cuda" if cuda else "cpu",
        model_metadata=info,
        max_payload_size=MOST_BYTES,
    )
    server.app.add_exception_handler(RequestValidationError, _say_what_is_wrong)

    main = os.getpid()

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        # At shutdown, LitServe's monitor may read what was just closed, and log it in 20 lines.
        logging.getLogger("litserve.server").addFilter(
            lambda record: record.msg != "Monitoring worker crashed"
        )
        # LitServe shuts down cleanly. Its HTTP process inherits this handler and exits at once.
        raise KeyboardInterrupt if os.getpid() == main else SystemExit(0)

    before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
    address = f"[{host}]" if ":" in host else host
    print(f"serving {path} at http://{address}:{port}; Ctrl-C stops it", flush=True)
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
        pass  # the signal came before the server was ready
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _info(classifier: TextClassifier) -> dict[str, Any]:
    """Return the content of ``/info``."""
    model = classifier.model
    exported = type(model.encoder).__name__ == "OnnxEncoder"
    return {
        "classes": list(classifier.class_names),
        "layers": model.num_layers,
        "halting": model.halting,
        "dial": {name: getattr(model, name) for name in ("halting_tolerance", "halting_margin")},
        "promise": model.calibration,
        "runs on": "ONNX Runtime" if exported else "PyTorch",
    }


async def _say_what_is_wrong(request: Request, error: Exception) -> JSONResponse:
    """Return status 422 without the input, which FastAPI would repeat, failing on invalid
    Unicode."""
    faults = error.errors()[:SHOWN_FAULTS] if isinstance(error, RequestValidationError) else []
    detail = [{name: fault[name] for name in ("loc", "msg", "type")} for fault in faults]
    return JSONResponse({"detail": detail, "expected": EXPECTED}, 422)
