"""All patterns that a push searches for: identifiers of patients, secrets, and paths of machines.

Models (`folder_checks`) and data (`publish_data`) are searched for them. No pattern can start a long scan at many
positions of a text: repetitions are bounded, or a lookbehind allows only one start per run of characters. So the
time of a search is linear in the length of the text.
"""

import csv
import re
from collections.abc import Sequence

OVERLAP = 4096
"""Overlap in characters of the pieces of a long text, longer than the decisive part of any match."""

_LETTER = r"[^\W\d_]"
_CAPITAL = r"[A-ZÀ-ÖØ-Þ]"
_MONTHS = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}"
_DAY, _MONTH, _YEAR = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])", r"(?:19|20)\d\d"

# Dates, names, numbers

DATE = re.compile(
    rf"(?<!\d)(?:{_YEAR}([-./_]){_MONTH}\1{_DAY}|{_DAY}([-./_]){_MONTH}\2{_YEAR}|{_MONTH}([-./_]){_DAY}\3{_YEAR}"
    rf"|{_DAY}\.? {_MONTHS}\.?,? {_YEAR}|{_MONTHS}\.? {_DAY},? {_YEAR}"
    rf"|{_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))(?!\d)",
    re.IGNORECASE,
)

_CAPTION_PATTERNS = tuple(
    (kind, pattern if isinstance(pattern, re.Pattern) else re.compile(pattern))
    for kind, pattern in (
        ("a date", DATE),
        ("a date", r"(?i)\b(?:d\.?o\.?b\b\.?|date of birth|born)(?: on| in)?\s{0,5}[:=]?\s{0,5}\d"),
        (
            "a record number",
            r"(?i)(?<![a-z])(?:mrn|medical record|record no|patient id|accession)\W{0,3}(?:number|no)?\W{0,3}"
            r"\w{0,12}\d{3}",
        ),
        ("a record number", r"(?<![\w.,+-])[1-9]\d{6,9}(?![\w.,]{0,20}\d)"),
        ("a record number", r"(?<!\d)\d{3}-\d{2}-\d{4}(?!\d)"),
        (
            "a name",
            r"(?<![A-Za-z])(?:[Pp]atient(?:'s)?(?: [Nn]ame)?|PATIENT(?: NAME)?|[Nn]ame|NAME)\s{0,20}[:=]\s{0,20}"
            rf"(?!(?:(?:[Ff]em|[Mm])ale|[Uu]nknown|[Aa]nonym\w{{0,9}}|ANON\w{{0,9}})\b){_CAPITAL}(?:{_LETTER}|['-])",
        ),
        ("a name", rf"\b(?:Mr|Mrs|Ms|Dr)\.? {_CAPITAL}[^\W\dA-Z_]"),
        ("a name", rf"{_LETTER}{{2}}\^{_LETTER}"),
        (
            "a phone number",
            r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\) ?|\d{2,4}[ .-])\d{3,4}[ .-]\d{3,4}(?![\w]|[.,]\d)",
        ),
        ("an e-mail address", r"[\w.+-]@[\w-]{1,63}\.\w"),
    )
)


def kinds(text: str) -> list[str]:
    """Kinds of identifiers that a caption or file name seems to contain.

    The search finds known patterns only.

    Returns:
        "a date", "a record number", ..., each at most once.
    """
    return list(dict.fromkeys(kind for kind, pattern in _CAPTION_PATTERNS if pattern.search(text)))


FILE_NAME = re.compile(
    r"(?:patient|subject|accession|mrn|pat[_-]?id)s?[_-]?(?:id|nr|no)?[_-]?\d{2}"
    r"|(?<![a-z0-9])[ps][15]\d{7}(?!\d)"
    r"|(?<![\d.])\d{1,64}(?:\.\d{1,64}){5}"
    r"|(?:[0-9a-f]{8}-){4}[0-9a-f]{8}"
    rf"|{_LETTER}\^{_LETTER}",
    re.IGNORECASE,
)
"""File names that identify a patient, study or image: words with a number, those of MIMIC-CXR, UIDs, DICOM person
names. Stricter than `kinds`: a model does not need such names, but data sets do."""

UID = re.compile(r"(?<![\d.])1\.(?:2|3)\.(?!840\.10008\.)\d{1,64}\.\d{1,64}(?:\.\d{1,64}){3}")
"""UID of an image or study; those of the standard itself (1.2.840.10008) are public."""

# Fields

_FIELD = (
    r"(?:patient_?(?:name|id|birth_?date|age|sex)|accession_?(?:number|no)|(?:study|series|sop)_?instance_?uid"
    r"|subject_?id|study_?id|dicom_?id|mrn|date_?of_?birth|dob)"
)
FIELD = re.compile(rf"(?<![a-z0-9_])[\"']?{_FIELD}[\"']?\s{{0,20}}[:=]", re.IGNORECASE)
"""A field of a patient or study in a data file, with or without a value."""

CLINICAL_TEXT = re.compile(
    rf"(?<![a-z0-9_]){_FIELD}[\"'*`]{{0,3}}\s{{0,5}}[:=][\s\"'*`]{{0,8}}[^\s\"'*`,;]{{0,12}}?\d{{2}}"
    r"|(?<![a-z])(?:mrn|medical record (?:number|no)|patient id|accession (?:number|no))\W{0,8}\d{3}"
    r"|(?<![a-z])(?:d\.?o\.?b\.?|date of birth)\W{0,8}\d{1,4}[-./ ]\w{1,9}[-./ ]{1,2}\d{2}"
    rf"|(?<![a-z])patient(?:'s)? name[\"'*`]{{0,3}}\s{{0,5}}[:=][\s\"'*`]{{0,8}}(?!unknown|anonym|<){_LETTER}{{2}}"
    r"|(?<![a-z])(?-i:[A-Z]{2}[A-Z-]{0,30}\^[A-Z]{2})",
    re.IGNORECASE,
)
"""A field of a patient or study with a value, in prose and logs, which may explain the field."""

_IDENTITY_COLUMN = re.compile(
    rf"{_FIELD}|patient|patient_?(?:nr|no|number|code)|pat_?(?:id|nr)|mrn|birth_?da(?:te|y)|ssn|social_?security\w{{0,9}}"
    r"|nhs_?(?:number|no)|insurance_?(?:number|no|id)|first_?name|last_?name|surname|given_?name|family_?name"
    r"|patienten_?(?:name|id|nr|nummer)|vorname|nachname|geburts(?:datum|tag)|fall_?(?:nr|nummer)"
    r"|(?:nom_?(?:du_?)?|id_?)patient|pr[eé]nom|date_?(?:de_?)?naissance"
    r"|(?:nombre_?(?:del_?)?|id_?)paciente|apellidos?|fecha_?(?:de_?)?nacimiento",
    re.IGNORECASE,
)
_CONTENT_COLUMN = re.compile(
    r"reports?(?:_text)?|findings|impression|captions?|befund|(?:image|dicom)(?:_?(?:path|file|id))?", re.IGNORECASE
)
# Harmless alone ("name" of a metric, "age" of a subgroup), but together a list of persons.
_PERSON_COLUMN = re.compile(r"(?:full_?)?name|nom|nombre|initials", re.IGNORECASE)
_DIAGNOSIS_COLUMN = re.compile(r"diagnos\w{1,5}|diagnóstico|icd(?:_?(?:9|10|code))?", re.IGNORECASE)
_TRAIT_COLUMN = re.compile(r"age|alter|âge|edad|sex|gender|geschlecht|sexe|sexo", re.IGNORECASE)
_CONTACT_COLUMN = re.compile(
    r"address|adresse|phone|telephone|telefon|e_?mail|ward|station|physician|arzt|(?:study|visit|admission)_?date",
    re.IGNORECASE,
)


def cells(line: str) -> list[str]:
    """The cells of a line of a table, split by the usual delimiter that results in most cells."""
    # Within a line, csv refuses what ends lines, and before Python 3.11 also zero bytes.
    line = re.sub(r"[\0\r\n]", " ", line).strip().strip("|").lstrip("\ufeff")
    rows = [next(csv.reader([line], delimiter=delimiter), []) for delimiter in ",;\t|"]
    return [cell.strip() for cell in max(rows, key=len)]


def personal_column(columns: Sequence[str], prose: bool = False) -> str | None:
    """The name of a column that identifies a table as one of patients; `None` if there is none.

    Args:
        columns: Names of the columns.
        prose: Whether the table is part of a text, which may count reports, or list authors with addresses.
    """
    named = {re.sub(r"[\s.-]+", "_", column.strip(" \t\"'*`")): column for column in columns}

    def first(pattern: re.Pattern[str]) -> str | None:
        return next((column for name, column in named.items() if pattern.fullmatch(name)), None)

    identity = first(_IDENTITY_COLUMN)
    person, diagnosis, trait = first(_PERSON_COLUMN), first(_DIAGNOSIS_COLUMN), first(_TRAIT_COLUMN)
    if prose:
        return identity or (person if diagnosis and trait else None)
    if person and (trait or diagnosis or first(_CONTACT_COLUMN)):
        return person
    return identity or first(_CONTENT_COLUMN) or (diagnosis if trait else None)


# Secrets

SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30}|api_org_[A-Za-z0-9]{30}|gh[oprsu]_[A-Za-z0-9]{36}"
    r"|github_pat_\w{50}|glpat-[\w-]{20}|sk-[\w-]{20}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{10}"
    r"|pypi-[\w-]{50}|npm_[A-Za-z0-9]{36})"
    # A JSON Web Token: two base64 parts that begin with '{"', and a signature.
    r"|(?<![\w-])eyJ[\w-]{8,2000}\.eyJ[\w-]{8,2000}\.[\w-]{8}"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    r"|(?:api|access|secret)[_-]?(?:key|token)[\"']?\s{0,5}[:=]\s{0,5}[\"']?[\w+/-]{16}"
    # A user name and password in a URL, and in .netrc.
    r"|://(?!user(?:name)?:|you:|name:)[^\s/:@\"'<>${}]{1,64}:[^\s/@\"'<>${}]{3,64}@\w"
    r"|(?<!\w)machine\s{1,5}\S{1,99}\s{1,5}login\s{1,5}\S{1,99}\s{1,5}password\s{1,5}\S",
    re.IGNORECASE,
)
_PASSWORD = r"(?:password|passwd|passphrase|pwd)"
_PLACEHOLDER = r"(?!/|x{3}|\*{3}|\.{3}|your|none\b|null\b|true\b|false\b)"
PASSWORD = re.compile(
    rf"{_PASSWORD}[\"']?\s{{0,3}}[:=]\s{{0,3}}[\"']?{_PLACEHOLDER}[^\s\"'<>${{}}()\[\],]{{4}}", re.IGNORECASE
)
"""In configuration files, where any value after the word is a password."""
PASSWORD_IN_PROSE = re.compile(
    rf"{_PASSWORD}[\"'`*]{{0,3}}\s{{0,3}}[:=][\s`*]{{0,3}}[\"']?{_PLACEHOLDER}"
    r"(?=[^\s\"'<>${}()\[\],`]{0,40}\d)[^\s\"'<>${}()\[\],`]{6}",
    re.IGNORECASE,
)
"""In prose, where other words may follow: six characters with a digit."""
PASSWORD_IN_CODE = re.compile(
    rf"{_PASSWORD}\s{{0,3}}=\s{{0,3}}(?P<quote>[\"']){_PLACEHOLDER}[^\s\"'<>${{}}]{{4,99}}(?P=quote)", re.IGNORECASE
)
CREDENTIAL_FILE = re.compile(
    r"(?:^|/)(?:\.env(?:\..{1,40})?|[._]netrc|\.pypirc|\.npmrc|\.git-credentials|\.htpasswd|\.pgpass|\.s3cfg|kaggle\.json"
    r"|stored_tokens|id_(?:rsa|dsa|ecdsa|ed25519)|[^/]{1,99}\.(?:pem|key|p12|pfx|jks|keystore|kdbx|ppk))$"
    r"|(?:^|/)\.(?:ssh|aws|gnupg|kube|docker)/",
    re.IGNORECASE,
)
"""Files for secrets, whatever their content."""

# Paths

_ROOTS = "home|Users|root|mnt|data|tmp|var|work|workspace|scratch|srv|media|nfs|gpfs|lustre|Volumes|content"
_NOT_A_PERSON = r"(?!(?:you|me|name|user|username|public|default|<)(?:\W|$))"
_WINDOWS_HOME = rf"(?<![A-Za-z])[A-Za-z]:\\{{1,2}}(?:Users|Documents and Settings)\\{{1,2}}{_NOT_A_PERSON}\w"
# In JSON and code `A:\nB` is a letter, a colon and a line end: there, backslashes of a path are doubled.
_WINDOWS_ESCAPED = r"(?<![A-Za-z])[A-Za-z]:\\\\\w[\w .-]{0,99}\\\\"
_WINDOWS_PLAIN = r"(?<![A-Za-z])[A-Za-z]:\\\w[\w .-]{0,99}\\"


def machine_paths(own: Sequence[str]) -> dict[str, re.Pattern[str]]:
    """Patterns of absolute paths.

    Args:
        own: Folders of this machine, which are found in addition to usual ones.

    Returns:
        Kind of text -> pattern. In "prose", a Windows path is an example unless it contains a user name; in "escaped"
        text (JSON, code), backslashes are doubled; "plain" is all other text.
    """
    folders = "|".join(re.escape(folder) for folder in own) or r"(?!)"
    before = r"(?:(?<=file://)|(?<![\w./~>})-]))"
    unix = rf"{before}(?:/(?:{_ROOTS})/[\w.~-]|(?:{folders})(?![\w.-]))"
    windows = {"prose": _WINDOWS_HOME, "escaped": _WINDOWS_ESCAPED, "plain": _WINDOWS_PLAIN}
    return {
        kind: re.compile("|".join(dict.fromkeys((unix, _WINDOWS_HOME, pattern)))) for kind, pattern in windows.items()
    }


# SVG, and escape sequences

SCRIPT = re.compile(
    r"<\s{0,5}(?:script|foreignobject|iframe|embed|object|handler)\b|\son[a-z]{3,20}\s{0,5}=|javascript:|<!entity"
    r"|@import|(?:href|src)\s{0,5}=\s{0,5}[\"']\s{0,5}(?:https?:)?//|url\(\s{0,5}[\"']?(?:https?:)?//",
    re.IGNORECASE,
)
"""What runs code or loads external content when an SVG is shown."""

_ESCAPE = re.compile(
    r"\\u\{?([0-9a-fA-F]{4})|\\U0{3}([0-9a-fA-F]{5})|\\x([0-9a-fA-F]{2})|&#x0{0,5}([0-9a-fA-F]{1,5});"
    r"|&#0{0,5}(\d{1,6});|(\\/)"
)


def unescaped(text: str) -> str | None:
    r"""A text in which `\u0041`, `\x41`, `&#65;` and `\/` are replaced by their characters; `None` if it has none.

    Line numbers are preserved: an escape sequence never becomes a line break.
    """

    def character(match: re.Match[str]) -> str:
        if match[6]:
            return "/"
        code = int(match[5]) if match[5] else int(next(filter(None, match.groups())), 16)
        return chr(code) if 32 <= code < 0x110000 else " "

    if "\\" not in text and "&#" not in text:
        return None
    found = _ESCAPE.sub(character, text)
    return None if found == text else found
