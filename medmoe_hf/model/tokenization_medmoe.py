"""Tokenizer of MedMoE: any fast tokenizer, plus the word that every piece belongs to."""

# mypy: allow-subclassing-any
# transformers is untyped.

# First, for with older releases of transformers it stops, and says so.
from .configuration_medmoe import REQUIRED_TRANSFORMERS as REQUIRED_TRANSFORMERS
from .configuration_medmoe import attach_to_package

# isort: split
import copy
import string
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, BertTokenizer, PreTrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, get_tokenizer_config
from transformers.tokenization_utils_base import LARGE_INTEGER, BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

# The special tokens of a tokenizer.json that comes without tokenizer_config.json, by what BERT and RoBERTa call them.
_SPECIAL_TOKEN_NAMES = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
    "bos_token": ("<s>",),
    "eos_token": ("</s>",),
}
_LONGEST_WORD = 1000
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def _word_keys(encoding: Any) -> list[tuple[int, int] | None]:
    """For each piece of a `tokenizers.Encoding` the text (0, or 1 in a pair) and word it belongs to, or None."""
    pieces = zip(encoding.sequence_ids, encoding.word_ids, strict=True)
    return [None if word is None else (sequence, word) for sequence, word in pieces]


def _complete(tokenizer: TokenizersBackend) -> None:
    """Add to what a bare tokenizer.json gives the special tokens and input names that it implies but does not say."""
    vocabulary = tokenizer.get_vocab()
    for role, names in _SPECIAL_TOKEN_NAMES.items():
        known = [name for name in names if name in vocabulary]
        if getattr(tokenizer, role) is None and known:
            setattr(tokenizer, role, known[0])
    if any(tokenizer.backend_tokenizer.encode("a", "b").type_ids):
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]


class MedMoETokenizer(TokenizersBackend):
    """Any fast tokenizer that also emits `word_ids`, and pads and truncates unless told otherwise.

    A call returns, beside the wrapped tokenizer's outputs, `word_ids`: (B, L) integers, for each piece the index of
    its word within the row, and -1 for padding and for the special tokens that the tokenizer adds. Words are what the
    tokenizer's pre-tokenizer makes of the text (for BERT: runs between spaces, and each punctuation mark alone; for
    byte-level BPE a further space between two words is a word too), or the items of the list with
    `is_split_into_words`. A row counts its words 0, 1, 2, ... without gaps, in order of appearance: the words of a
    text pair go on counting in the second text, and what truncation removed is not counted. Special tokens that the
    text itself contains are words.

    `padding=True` and `truncation=True` (at `model_max_length`) are the defaults of a call, because stock pipelines
    do not truncate; explicit arguments win. `encode` and `tokenize` are the stock ones. In a `BatchEncoding`,
    `encoding["word_ids"]` is this output, while `encoding.word_ids(i)` is transformers' method.

    Construct with `from_pretrained` (a folder or Hub id of this class or of any fast tokenizer), `from_tokenizer` or
    `from_words`.
    """

    # An `__init__` here would make from_pretrained rebuild the backend from its vocabulary alone, without merges,
    # normalizer and pre-tokenizer (`TokenizersBackend.convert_to_native_format`).
    model_input_names = ["input_ids", "attention_mask", "word_ids"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *init_inputs: Any, **kwargs: Any
    ) -> "MedMoETokenizer":
        """Load a saved `MedMoETokenizer`, or wrap any other fast tokenizer.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id. Whatever `AutoTokenizer` can load, and also folders
                with nothing but `tokenizer.json` or BERT's `vocab.txt`.
            kwargs: as for every tokenizer; `model_max_length=...` sets the length that calls truncate to, which a
                bare `vocab.txt` or `tokenizer.json` does not say.

        Raises:
            ValueError: there is no tokenizer, or it is not a fast one.
        """
        kwargs.pop("backend", None)  # AutoProcessor hands the image processor's choice to the tokenizer as well
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        saved = get_tokenizer_config(pretrained_model_name_or_path, **hub)
        if "word_ids" in saved.get("model_input_names", ()) or saved.get("tokenizer_class") == cls.__name__:
            loaded: MedMoETokenizer = super().from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)
            return loaded

        def has(name: str) -> bool:
            found = cached_file(
                pretrained_model_name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub
            )
            return found is not None

        config = {}
        if has("config.json"):
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
        # A config of MedMoE would lead AutoTokenizer back here, one of an unknown kind to an error.
        named = saved.get("tokenizer_class") or saved.get("auto_map") or config.get("tokenizer_class")
        if named or config.get("model_type") in TOKENIZER_MAPPING_NAMES:
            wrapped = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)
        else:
            for key in ("_from_auto", "_commit_hash", "trust_remote_code"):
                kwargs.pop(key, None)
            if has("tokenizer.json"):
                wrapped = TokenizersBackend.from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)
                _complete(wrapped)
            elif has("vocab.txt"):
                wrapped = BertTokenizer.from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)
            else:
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds no tokenizer: none of tokenizer_config.json, "
                    "tokenizer.json and vocab.txt, nor a config.json of a model with a known tokenizer"
                )
        return cls.from_tokenizer(wrapped)

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> "MedMoETokenizer":
        """Wrap a copy of a fast tokenizer: same ids, special tokens, sides and post-processing.

        Args:
            tokenizer: any fast tokenizer.
            max_length: the `model_max_length` of the result, in pieces including the special tokens; None keeps the
                tokenizer's own.

        Raises:
            ValueError: the tokenizer is not a fast one, or the length leaves no room for text.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"MedMoETokenizer wraps fast tokenizers only, got {type(tokenizer).__name__}")
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        # What the last call or a tokenizer.json left there would become defaults of the new object.
        backend.no_truncation()
        backend.no_padding()
        limit = tokenizer.model_max_length if max_length is None else max_length
        if limit <= tokenizer.num_special_tokens_to_add():
            raise ValueError(f"a length of {limit} pieces leaves no room beside the special tokens")
        if limit > LARGE_INTEGER:
            logger.warning(
                f"{tokenizer.name_or_path or type(tokenizer).__name__} has no model_max_length: long texts will not "
                "be truncated. Give model_max_length to from_pretrained, or max_length to from_tokenizer."
            )
        input_names = [name for name in tokenizer.model_input_names if name != "word_ids"]
        return cls(
            tokenizer_object=backend,
            model_max_length=limit,
            model_input_names=[*input_names, "word_ids"],
            padding_side=tokenizer.padding_side,
            truncation_side=tokenizer.truncation_side,
            clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
            split_special_tokens=tokenizer.split_special_tokens,
            **{name: token for name, token in tokenizer._special_tokens_map.items() if token is not None},
            **({"extra_special_tokens": list(extra)} if (extra := tokenizer._extra_special_tokens) else {}),
        )

    @classmethod
    def from_words(cls, words: Sequence[str], max_length: int = 512) -> "MedMoETokenizer":
        """A lower-casing BERT WordPiece tokenizer whose whole-word entries are the given words.

        The vocabulary is `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]`, `[MASK]`, then a-z, 0-9 and ASCII punctuation, the same
        again with `##`, then the words in their order, split as BERT splits text and without repeats. So ASCII words
        that are not in the list fall into single characters and never become `[UNK]` (up to 1000 characters per word).

        Args:
            words: words or whole texts; case is ignored.
            max_length: `model_max_length`, in pieces including `[CLS]` and `[SEP]`; at least 3.

        Raises:
            ValueError: `max_length` is below 3.
        """
        characters = string.ascii_lowercase + string.digits + string.punctuation
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
        splitter = BertTokenizer().backend_tokenizer
        for word in words:
            for piece, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(word)):
                vocabulary.append(piece)
        ids = {token: position for position, token in enumerate(dict.fromkeys(vocabulary))}
        wordpiece = BertTokenizer(vocab=ids)
        wordpiece.backend_tokenizer.model.max_input_chars_per_word = _LONGEST_WORD
        return cls.from_tokenizer(wordpiece, max_length)

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        *args: Any,
        padding: Any = None,
        truncation: Any = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Encode one text or a list; the arguments are those of every fast tokenizer.

        Args:
            text: a text or a list of texts (lists of words with `is_split_into_words=True`).
            padding: True when not given.
            truncation: True when not given, at `max_length` or else `model_max_length`.

        Returns:
            `input_ids`, `attention_mask`, `word_ids` and, where the wrapped tokenizer has them, `token_type_ids`,
            each (B, L); lists, or what `return_tensors` says. One text without `return_tensors` gives (L,).
        """
        return super().__call__(
            text,
            text_pair,
            *args,
            padding=True if padding is None else padding,
            truncation=True if truncation is None else truncation,
            **kwargs,
        )

    def words(self, text: Any, text_pair: Any = None, **kwargs: Any) -> list[str] | list[list[str]]:
        """The words that `word_ids` count, as they stand in the text: labels for heat-maps.

        Args:
            text: as in a call, with the call's further arguments (`max_length`, `is_split_into_words`, ...), so that
                the words are those of that call.

        Returns:
            For one text a list whose item i is the word with index i; for a list of texts a list of these. A word that
            truncation cut is given in full, words that it removed are missing.
        """
        kwargs = {**kwargs, "padding": False, "return_tensors": None, "return_overflowing_tokens": False}
        split = kwargs.get("is_split_into_words", False)
        batched = isinstance(text, (list, tuple)) and (not split or (bool(text) and not isinstance(text[0], str)))
        encodings = self(text, text_pair, **kwargs).encodings or []
        texts = list(text) if batched else [text]
        pairs = list(text_pair) if batched and text_pair is not None else [text_pair] * len(texts)
        rows = [self._surface(*row, split) for row in zip(encodings, texts, pairs, strict=True)]
        return rows if batched else rows[0]

    @staticmethod
    def _surface(encoding: Any, text: Any, text_pair: Any, split: bool) -> list[str]:
        kept = [key for key in dict.fromkeys(_word_keys(encoding)) if key is not None]
        spans: dict[Any, tuple[int, int]] = {}
        for part in (encoding, *encoding.overflowing):
            for key, (start, end) in zip(_word_keys(part), part.offsets, strict=True):
                first, last = spans.get(key, (start, end))
                spans[key] = (min(first, start), max(last, end))
        surface = []
        for sequence, word in kept:
            source = text_pair if sequence else text
            start, end = spans[sequence, word]
            surface.append(source[word] if split else source[start:end].strip())
        return surface

    def _convert_encoding(self, encoding: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], list[Any]]:
        outputs, encodings = super()._convert_encoding(encoding, *args, **kwargs)
        if "word_ids" in self.model_input_names:
            for row in encodings:
                count: dict[Any, int] = {}
                keys = row.word_ids if row.n_sequences == 1 else _word_keys(row)
                outputs["word_ids"].append([-1 if key is None else count.setdefault(key, len(count)) for key in keys])
        return outputs, encodings

    def _pad(self, encoded_inputs: Any, *, padding_side: str | None = None, **kwargs: Any) -> dict[str, Any]:
        padded: dict[str, Any] = super()._pad(encoded_inputs, padding_side=padding_side, **kwargs)
        if "word_ids" in padded:
            filler = [-1] * (len(padded[self.model_input_names[0]]) - len(padded["word_ids"]))
            left = (padding_side or self.padding_side) == "left"
            padded["word_ids"] = filler + padded["word_ids"] if left else padded["word_ids"] + filler
        return padded

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        # tokenizer.json would otherwise carry the padding and truncation of the last call, and from_pretrained would
        # take them for settings.
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        files: tuple[str, ...] = super()._save_pretrained(*args, **kwargs)
        return files


MedMoETokenizer.register_for_auto_class("AutoTokenizer")
attach_to_package(__name__)
