"""Smaller vocabularies: the word pieces that a corpus needs, with unchanged results on its texts.

Only WordPiece tokenizers (BERT's) can be reduced. They take the longest entry that begins a word, then the longest one
that continues it, and so on; without entries that a text never takes, it is split as before.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from medmoe_hf.data.captions import is_empty
from medmoe_hf.data.cells import selects
from medmoe_hf.data.fields import CAPTION_FIELDS
from medmoe_hf.data.phantom import phantom_vocabulary
from medmoe_hf.data.sources import PhantomSource, load_sources
from medmoe_hf.errors import ConvertError
from medmoe_hf.model import MedMoETokenizer

_BLOCK = 4096  # rows that are read at a time


def corpus_texts(path: str | Path) -> Iterator[str]:
    """Yields the texts of a corpus.

    Args:
        path: A text file (UTF-8) with one text per line, or a YAML file of sources, as `medmoe train` reads them. Of
            sources, captions, labels and the fields, templates and synonyms of captions are read, but no images.

    Raises:
        ConvertError: If there is no such file, or it is not UTF-8.
        SourceError: For sources that cannot be used.

    Example:
        >>> import pathlib, tempfile
        >>> from medmoe_hf.hub.vocabulary import corpus_texts
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "reports.txt"
        >>> _ = path.write_text("No effusion.\\nClear lungs.\\n")
        >>> list(corpus_texts(path))
        ['No effusion.', 'Clear lungs.']
    """
    path = Path(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        for source in load_sources(path):
            yield from _source_texts(source)
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (line.strip() for line in file if line.strip())
    except OSError as error:
        raise ConvertError(f"Cannot read the corpus {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConvertError(
            f"The corpus {path} is not UTF-8 text ({error.reason} at byte {error.start}). A corpus is a text file "
            "with one text per line, or a YAML file of sources."
        ) from error


def _source_texts(source: Any) -> Iterator[str]:
    """Yields every text from which the captions of a source can be made, without drawing from them."""
    if isinstance(source, PhantomSource):
        yield " ".join(phantom_vocabulary())
        return
    written = source.model_dump(include={"caption_template", "captions", "synonyms"})
    yield from _texts(list(written.values()))
    names = {*source.caption_fields, "label" if source.label is None else source.label}
    names |= set(CAPTION_FIELDS) if source.caption is None else {source.caption}
    for shard in source.shards():
        for start in range(0, len(shard), _BLOCK):
            rows = range(start, min(start + _BLOCK, len(shard)))
            for row in shard.peek(rows, names | set(source.filter_fields)):
                if selects(row, source.where, source.where_not):
                    yield from _texts([row[name] for name in sorted(names) if name in row])


def _texts(value: Any) -> Iterator[str]:
    """Yields the texts inside nested lists and dictionaries."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _texts([key, entry])
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts(entry)
    elif isinstance(value, (str, int, float)) and not is_empty(value):
        yield str(value)


@dataclass
class KeptTokens:
    """The tokens that are kept of a vocabulary.

    Attributes:
        ids: Their ids, ascending.
        total: Size of the vocabulary before.
        corpus: Number of tokens into which the corpus is split.
        characters: Number of other tokens that are single characters.
        frequent: Number of other tokens that were kept because they are frequent in general.
    """

    ids: list[int]
    total: int
    corpus: int
    characters: int
    frequent: int

    def __str__(self) -> str:
        frequent = f", {self.frequent} other frequent ones" if self.frequent else ""
        return (
            f"vocabulary: {len(self.ids)} of {self.total} tokens kept: {self.corpus} of the corpus, {self.characters} "
            f"other characters{frequent}, and special ones"
        )


def needed_tokens(tokenizer: MedMoETokenizer, texts: Iterable[str], size: int | None = None) -> KeptTokens:
    """Finds the tokens that a corpus needs.

    Kept are special tokens, the pieces into which the texts are split, and all single characters, at the beginning of
    a word and within it, so that other words can be spelled.

    Args:
        tokenizer: A WordPiece tokenizer.
        texts: The corpus.
        size: Number of tokens to keep: the first other entries of the vocabulary are kept too, which are the most
            frequent ones in BERT's vocabularies. None for those that are needed.

    Raises:
        ConvertError: If the tokenizer is of another kind, there are no texts, or `size` is less than what is needed.

    Example:
        >>> from medmoe_hf.hub.vocabulary import needed_tokens
        >>> from medmoe_hf.model import MedMoETokenizer
        >>> tokenizer = MedMoETokenizer.from_words(["pleural effusion", "fracture"])
        >>> kept = needed_tokens(tokenizer, ["No effusion"])
        >>> (kept.total - len(kept.ids), kept.corpus)
        (2, 3)
    """
    backend = tokenizer.backend_tokenizer
    content = _wordpiece(tokenizer)
    model = content["model"]
    vocabulary: dict[str, int] = model["vocab"]
    mark = model["continuing_subword_prefix"]
    special = {token["id"] for token in content["added_tokens"]} | set(tokenizer.all_special_ids)
    special |= {vocabulary[piece] for piece in (model["unk_token"],) if piece in vocabulary}
    words = set()
    for text in texts:
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        words |= {word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)}
    if not words:
        raise ConvertError("The corpus for --vocabulary has no text.")
    corpus = {
        token
        for word in words
        if len(word) <= model["max_input_chars_per_word"]
        for token in _pieces(word, vocabulary, mark)
    } - special
    characters = {token for piece, token in vocabulary.items() if len(piece.removeprefix(mark)) == 1}
    characters -= special | corpus
    kept = special | corpus | characters
    frequent: set[int] = set()
    if size is not None:
        if size < len(kept):
            raise ConvertError(
                f"--vocabulary-size {size} is less than the {len(kept)} tokens that are needed: {len(corpus)} by the "
                f"corpus, {len(characters)} other characters and {len(special)} special ones."
            )
        others = [
            token
            for piece, token in sorted(vocabulary.items(), key=lambda entry: entry[1])
            if token not in kept and not re.fullmatch(r"\[unused\d+\]", piece)
        ]
        frequent = set(others[: size - len(kept)])
    return KeptTokens(sorted(kept | frequent), len(tokenizer), len(corpus), len(characters), len(frequent))


def _pieces(word: str, vocabulary: dict[str, int], mark: str) -> Iterator[int]:
    """Yields the longest entries from the start of a word, up to where none fits and the word becomes unknown."""
    start = 0
    while start < len(word):
        before = mark if start else ""
        for end in range(len(word), start, -1):
            token = vocabulary.get(before + word[start:end])
            if token is not None:
                yield token
                start = end
                break
        else:
            return


def _wordpiece(tokenizer: MedMoETokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = content["model"]["type"]
    if kind != "WordPiece" or content["pre_tokenizer"] is None:
        raise ConvertError(
            f"--vocabulary reduces WordPiece vocabularies (those of BERT models), and this tokenizer's is {kind}. "
            "Leave --vocabulary out, or choose a text tower with WordPiece."
        )
    return content


def reduce_tokenizer(tokenizer: MedMoETokenizer, ids: list[int]) -> MedMoETokenizer:
    """Returns a tokenizer with some of the tokens of another, renumbered in their order.

    Args:
        tokenizer: A WordPiece tokenizer.
        ids: The tokens to keep, ascending, with all special tokens.

    Raises:
        ConvertError: If the tokenizer is of another kind.

    Example:
        >>> from medmoe_hf.hub.vocabulary import needed_tokens, reduce_tokenizer
        >>> from medmoe_hf.model import MedMoETokenizer
        >>> tokenizer = MedMoETokenizer.from_words(["pleural effusion", "fracture"])
        >>> small = reduce_tokenizer(tokenizer, needed_tokens(tokenizer, ["No effusion"]).ids)
        >>> small.tokenize("effusion"), len(tokenizer) - len(small)
        (['effusion'], 2)
    """
    content = _wordpiece(tokenizer)
    new = {old: position for position, old in enumerate(ids)}
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {piece: new[token] for piece, token in vocabulary.items() if token in new}
    for token in content["added_tokens"]:
        token["id"] = new[token["id"]]
    content["post_processor"] = _renumbered(content["post_processor"], new)
    reduced = copy.copy(tokenizer)
    reduced._tokenizer = Tokenizer.from_str(json.dumps(content))
    return MedMoETokenizer.from_tokenizer(reduced)


def _renumbered(processor: Any, new: dict[int, int]) -> Any:
    """Renumbers the ids of special tokens in a post-processor."""
    if processor is None:
        return None
    kind, result = processor["type"], dict(processor)
    if kind == "Sequence":
        result["processors"] = [_renumbered(part, new) for part in processor["processors"]]
    elif kind == "TemplateProcessing":
        result["special_tokens"] = {
            name: {**token, "ids": [new[old] for old in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    elif kind in ("BertProcessing", "RobertaProcessing"):
        result |= {role: [processor[role][0], new[processor[role][1]]] for role in ("sep", "cls")}
    else:
        raise ConvertError(f"--vocabulary cannot renumber the special tokens of a tokenizer with {kind}.")
    return result
