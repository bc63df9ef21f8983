"""Tokenizer of MedMoE: any fast tokenizer, with the word of each token as an additional output."""

# mypy: allow-subclassing-any
# transformers is untyped.

# First, because it raises a clear error with older releases of transformers.
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

# The special tokens of a tokenizer.json without tokenizer_config.json, by their names in BERT and RoBERTa.
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
    """Returns the text (0, or 1 in a pair) and word of each token of a `tokenizers.Encoding`, or None."""
    pieces = zip(encoding.sequence_ids, encoding.word_ids, strict=True)
    return [None if word is None else (sequence, word) for sequence, word in pieces]


def _complete(tokenizer: TokenizersBackend) -> None:
    """Adds the special tokens and input names that a bare tokenizer.json implies but does not specify."""
    vocabulary = tokenizer.get_vocab()
    for role, names in _SPECIAL_TOKEN_NAMES.items():
        known = [name for name in names if name in vocabulary]
        if getattr(tokenizer, role) is None and known:
            setattr(tokenizer, role, known[0])
    if any(tokenizer.backend_tokenizer.encode("a", "b").type_ids):
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]


class MedMoETokenizer(TokenizersBackend):
    """Any fast tokenizer that also returns `word_ids`, and pads and truncates by default.

    In addition to the outputs of the wrapped tokenizer, a call returns `word_ids`: (B, L) integers, for each token the
    index of its word within the text, and -1 for padding and for the special tokens that the tokenizer adds. Words are
    those of the tokenizer's pre-tokenizer (for BERT: runs between spaces, and single punctuation marks; for byte-level
    BPE additional spaces between two words are words too), or the items of the list with `is_split_into_words`. Words
    are numbered 0, 1, 2, ... without gaps, in order of appearance: in a text pair the second text continues the
    numbers of the first, and truncated words are not counted. Special tokens within the text itself are words.

    `padding=True` and `truncation=True` (at `model_max_length`) are the defaults of a call, because the pipelines of
    transformers do not truncate. `encode` and `tokenize` are unchanged. In a `BatchEncoding`, `encoding["word_ids"]`
    is this output, while `encoding.word_ids(i)` is transformers' method.

    Create one with `from_pretrained` (a folder or Hub id of this class or of any fast tokenizer), `from_tokenizer` or
    `from_words`.

    Example:
        >>> from medmoe_hf.model import MedMoETokenizer
        >>> tokenizer = MedMoETokenizer.from_words(["pleural effusion"])
        >>> tokenizer(["effusion", "pleural effusion"])["word_ids"]
        [[-1, 0, -1, -1], [-1, 0, 1, -1]]
    """

    # With an `__init__` here from_pretrained would rebuild the backend from its vocabulary alone, without merges,
    # normalizer and pre-tokenizer (`TokenizersBackend.convert_to_native_format`).
    model_input_names = ["input_ids", "attention_mask", "word_ids"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *init_inputs: Any, **kwargs: Any
    ) -> "MedMoETokenizer":
        """Loads a saved `MedMoETokenizer`, or wraps any other fast tokenizer.

        Args:
            pretrained_model_name_or_path: A folder or a Hub id: anything that `AutoTokenizer` can load, and folders
                with only `tokenizer.json` or BERT's `vocab.txt`.
            *init_inputs: As for every tokenizer.
            **kwargs: As for every tokenizer; `model_max_length` sets the length to which calls truncate, which a bare
                `vocab.txt` or `tokenizer.json` does not specify.

        Returns:
            The tokenizer.

        Raises:
            ValueError: There is no tokenizer, or it is not a fast one.

        Example:
            >>> import tempfile
            >>> from medmoe_hf.model import MedMoETokenizer
            >>> folder = tempfile.mkdtemp()
            >>> files = MedMoETokenizer.from_words(["effusion"], max_length=16).save_pretrained(folder)
            >>> MedMoETokenizer.from_pretrained(folder).model_max_length
            16
        """
        kwargs.pop("backend", None)  # AutoProcessor passes the option of the image processor to the tokenizer too
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
        # With a config of MedMoE AutoTokenizer would call this method again, with an unknown one it would fail.
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
        """Wraps a copy of a fast tokenizer: same ids, special tokens, sides and post-processing.

        Args:
            tokenizer: Any fast tokenizer.
            max_length: The `model_max_length` of the result, in tokens including special ones; None keeps the
                tokenizer's own.

        Returns:
            The tokenizer.

        Raises:
            ValueError: The tokenizer is not a fast one, or the length leaves no room for text.

        Example:
            >>> from medmoe_hf.model import MedMoETokenizer
            >>> from transformers import BertTokenizer
            >>> vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "chest": 5}
            >>> MedMoETokenizer.from_tokenizer(BertTokenizer(vocab=vocabulary), max_length=16)("chest")["input_ids"]
            [2, 5, 3]
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"MedMoETokenizer wraps fast tokenizers only, got {type(tokenizer).__name__}")
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        # Settings of the last call or of a tokenizer.json would become defaults of the new object.
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
        """Creates a lower-casing BERT WordPiece tokenizer with the given words as entries.

        The vocabulary is `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]`, `[MASK]`, then a-z, 0-9 and ASCII punctuation, these
        again with `##`, then the words in their order, split as BERT splits text and without duplicates. ASCII words
        that are not in the list are thus split into characters and never become `[UNK]` (up to 1000 characters per
        word).

        Args:
            words: Words or texts; case is ignored.
            max_length: `model_max_length`, in tokens including `[CLS]` and `[SEP]`; at least 3.

        Returns:
            The tokenizer.

        Raises:
            ValueError: `max_length` is less than 3.

        Example:
            >>> from medmoe_hf.model import MedMoETokenizer
            >>> MedMoETokenizer.from_words(["pleural effusion"]).tokenize("No effusion")
            ['n', '##o', 'effusion']
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
        """Encodes one text or a list; the arguments are those of every fast tokenizer.

        Args:
            text: A text or a list of texts (lists of words with `is_split_into_words=True`).
            text_pair: A second text for each text, or None.
            *args: As for every fast tokenizer.
            padding: True by default.
            truncation: True by default, at `max_length` or else `model_max_length`.
            **kwargs: As for every fast tokenizer.

        Returns:
            `input_ids`, `attention_mask`, `word_ids` and, where the wrapped tokenizer has them, `token_type_ids`,
            each `(B, L)`, as lists or in the format of `return_tensors`; `(L,)` for one text without it.
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
        """Returns the words to which `word_ids` refer, as written in the text: labels for heat maps.

        Args:
            text: As in a call.
            text_pair: As in a call.
            **kwargs: The other arguments of the call (`max_length`, `is_split_into_words`, ...), so that the words are
                the same.

        Returns:
            For one text a list whose item i is the word with index i; for a list of texts a list of such lists. A word
            that was cut by truncation is returned in full, words that were removed are missing.

        Example:
            >>> from medmoe_hf.model import MedMoETokenizer
            >>> MedMoETokenizer.from_words(["pleural effusion"]).words("Small pleural effusion.")
            ['Small', 'pleural', 'effusion', '.']
        """
        kwargs = {**kwargs, "padding": False, "return_tensors": None, "return_overflowing_tokens": False}
        split = kwargs.get("is_split_into_words", False)
        batched = isinstance(text, (list, tuple)) and (not split or (bool(text) and not isinstance(text[0], str)))
        encodings = self(text, text_pair, **kwargs).encodings or []
        texts = list(text) if batched else [text]
        pairs = list(text_pair) if batched and text_pair is not None else [text_pair] * len(texts)
        rows = [self._written_words(*row, split) for row in zip(encodings, texts, pairs, strict=True)]
        return rows if batched else rows[0]

    @staticmethod
    def _written_words(encoding: Any, text: Any, text_pair: Any, split: bool) -> list[str]:
        kept = [key for key in dict.fromkeys(_word_keys(encoding)) if key is not None]
        spans: dict[Any, tuple[int, int]] = {}
        for part in (encoding, *encoding.overflowing):
            for key, (start, end) in zip(_word_keys(part), part.offsets, strict=True):
                first, last = spans.get(key, (start, end))
                spans[key] = (min(first, start), max(last, end))
        words = []
        for sequence, word in kept:
            source = text_pair if sequence else text
            start, end = spans[sequence, word]
            words.append(source[word] if split else source[start:end].strip())
        return words

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
        # Otherwise tokenizer.json would contain the padding and truncation of the last call, and from_pretrained would
        # read them as settings.
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        files: tuple[str, ...] = super()._save_pretrained(*args, **kwargs)
        return files


MedMoETokenizer.register_for_auto_class("AutoTokenizer")
attach_to_package(__name__)
