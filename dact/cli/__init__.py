"""The command line; start reading at `dact.__main__`."""

# What each command does, for the help.
TRAINING = {
    "fit": "train a classifier; writes checkpoints and a model/ folder",
    "tune": "tune submodels, training and lambda_reg in three studies, then fit",
}
STORED = {
    "validate": "measure a model on the validation examples",
    "test": "measure a model on the test examples, and check its promise",
    "predict": "classify the texts of a file, or of standard input",
    "calibrate": "find the margin, or tolerance, that keeps a promise, and store it",
    "export": "write the layers of a model as ONNX Runtime graphs",
    "serve": "answer classification requests over HTTP",
}
# The option that each of them usually needs besides --model.
NEEDED = {
    "validate": "--data.val_file FILE",
    "test": "--data.test_file FILE",
    "predict": "--data.predict_file FILE",
    "calibrate": "--data.calibration_file FILE",
    "export": "--output FOLDER",
    "serve": "",
}
