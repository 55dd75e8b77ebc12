"""A saved network on the Hugging Face hub, with a model card."""

from pathlib import Path

from ofb.export.card import model_card
from ofb.export.folder import ARCHITECTURE
from ofb.export.programs import ONNX_FILE, PROGRAM_FILE
from ofb.export.sizes import WEIGHTS

CARD = "README.md"
FILES = (ARCHITECTURE, WEIGHTS, ONNX_FILE, PROGRAM_FILE)


def push_to_hub(folder: str | Path, repository: str, private: bool = False) -> str:
    """Put a saved network, and its ONNX file and program if they lie beside it, into a repository on the hub.

    The repository is made if there is none. It gets a model card unless it has one: yours stays as it is.
    `timm.create_model("hf-hub:USER/NAME", pretrained=True)` then loads the network where ofb is imported.

    Args:
        folder: what `ofb.save` wrote.
        repository: USER/NAME.
        private: whether a new repository is to be seen by its owner alone.

    Returns:
        The address of the repository.

    Raises:
        ValueError: no such name, no token, or the hub did not take it; the message says what to do.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    user, slash, name = repository.partition("/")
    if not (user and slash and name) or "/" in name:
        raise ValueError(f"push_to_hub: expected USER/NAME, got {repository!r}")
    folder, api, card = Path(folder), HfApi(library_name="ofb-kernels"), model_card(folder, repository)
    if get_token() is None:
        raise ValueError("push_to_hub: expected a token of the hub, got none; run `hf auth login` or set HF_TOKEN")
    files = [CommitOperationAdd(file, folder / file) for file in FILES if (folder / file).is_file()]
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        if not api.file_exists(repository, CARD):
            files.append(CommitOperationAdd(CARD, card.encode()))
        api.create_commit(repository, files, commit_message="Add the network")
    except Exception as error:  # which exceptions there are depends on the client's version
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"push_to_hub: {repository} was not written: {reason}; check the connection, and with `hf auth whoami` "
            f"whether the token may write there. Nothing is lost: the network lies in {folder}"
        ) from error
    return str(address)
