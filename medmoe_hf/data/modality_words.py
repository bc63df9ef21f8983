"""The modality of an image from the words of its caption, by rules; unknown if the words are ambiguous.

A mention of the imaging technique decides. Mentions of other studies ("compared with the previous CT", "recommend
MRI") are ignored. Only if no technique is named, words decide that are specific to one technique ("hypoechoic",
"costophrenic angle"): a CT of a patient with retinal detachment is a CT.
"""

import re
from collections.abc import Iterator
from itertools import islice

# Techniques other than the six modalities: if one is named, the modality is unknown, as for a tie.
_OTHER = "other"

# Case is ignored except in (?-i:...): abbreviations that are also words (US, STIR, FLAIR), months (OCT), titles (MR).
_NAMED: dict[str, tuple[str, ...]] = {
    "xray": (
        r"x[- ]?rays?",
        r"(?:tele)?radiograph(?:s|ic|ically)?",
        r"roentgenogra(?:ms?|phy|phic)",
        r"orthopantomogra(?:ms?|phy)",
        r"(?-i:CXRs?|AXR|KUB)",
        r"mammogra(?:ms?|phy|phic)",
        r"(?:chest|abdominal|plain|portable) films?",
        r"pa (?:and|/|&) (?:left )?lat(?:eral)?",
        r"(?:frontal|ap|pa) and (?:left )?lateral",
        r"(?:frontal|lateral|ap|pa|portable|single|two|oblique) (?:chest )?(?:views?|projections?) of (?:the )?"
        r"(?:\w+ )?(?:chest|thorax|hand|wrist|elbow|shoulder|knee|ankle|foot|hip|pelvis|femur|forearm|spine)",
        r"(?:frontal|lateral|ap|pa|portable) chest",
    ),
    "ct": (
        r"(?:hr|ce|nc|cb|mp|md)?cts?(?! (?:ratio|surge))",
        r"(?-i:CTA|CTPA)",
        r"(?:computed|computeri[sz]ed) (?:axial )?tomogra(?:phy|phic|ms?)",
        r"cat scans?",
    ),
    "mri": (
        r"f?mris?",
        r"(?-i:MRA|MRV|MRCP)",
        r"magnetic resonance",
        r"(?-i:MR)[- ](?:imag\w+|scans?|sequences?|exam\w*|spectro\w+|(?:angio|veno|entero|arthro|cholangio)\w+)",
        r"(?:axial|coronal|sagittal|brain|cardiac|enhanced|weighted) (?-i:MR)",
        r"(?-i:T[12])\*?[- ]?(?:weight(?:ed|ing)|wi?\b)",
        r"(?:diffusion|susceptibility|proton[- ]density)[- ]weighted",
        r"(?-i:FLAIR|DWI|STIR|SWI)",
        r"adc maps?",
        r"gadolinium[- ]enhanced",
    ),
    "ultrasound": (
        r"ultra-?sound(?:s|ed)?",
        r"(?:ultra)?sono(?:gra(?:ms?|phy|phic|phically)|elastogra\w+)",
        r"(?-i:US)[- ](?:imag\w+|scans?|exam\w*|of the|shows?|showed|showing|demonstrat\w+|reveal\w+)",
        r"(?:abdominal|pelvic|renal|hepatic|thyroid|breast|scrotal|testicular|transvaginal|transrectal|endoscopic"
        r"|duplex|gr[ae]y-?scale|b-mode) (?-i:US)",
        r"echocardiogra(?:ms?|phy|phic)",
        r"b-mode",
        r"(?:colou?r|power|spectral|duplex|pulsed?) (?:flow )?doppler",
        r"doppler",
    ),
    "histopathology": (
        r"h ?& ?e\b",
        r"ha?ematoxylin",
        r"histo(?:log|patholog)(?:y|ic|ical)",
        r"(?:photo)?micrographs?",
        r"immunohistochemi(?:stry|cal)",
        r"(?:light )?microscopy",
        r"microscopic (?:view|image|field|appearance|section|examination)s?",
        r"(?:high|low|medium)[- ]power(?:ed)? (?:view|field|magnification)s?",
        r"original magnification",
        r"(?:tissue|stained|paraffin|biopsy) sections?",
    ),
    "fundus": (
        r"(?:colou?r|ocular|retinal|optical|dilated|eye) fundus",
        r"fundus (?:colou?r |camera )*(?:photo\w*|image\w*|picture\w*|exam\w*|view\w*|of (?:the|an) eye)",
        r"fund[ou]scop(?:y|ic)",
        r"retinal (?:colou?r )?(?:photo\w*|image\w*|picture\w*)",
    ),
    _OTHER: (
        r"(?-i:OCTA?)(?! \d)",
        r"optical coherence",
        r"(?-i:F?PET|SPECT)(?! bott)",
        r"positron emission",
        r"scintigra\w+",
        r"bone scans?",
        r"(?:fluorescein|indocyanine green|catheter|digital subtraction) angiogra\w+",
        r"(?:electron|confocal|fluorescence) micro\w+",
        r"(?:(?:gastro|colono|broncho|laryngo|dermo|arthro|cysto)scop\w+|endoscop\w+)(?! (?:us|ultraso))",
        r"(?:clinical|gross|intra-?operative|intraoral|external) (?:photo\w*|images?|views?|pictures?|specimens?)",
        r"electro(?:cardio|encephalo)gra\w+",
    ),
}
_SHOWN: dict[str, tuple[str, ...]] = {
    "xray": (
        r"(?:cardio-?mediastinal|cardiac|heart|mediastinal) (?:silhouette|contour)s?",
        r"costophrenic (?:angle|sulc)\w*",
    ),
    "ct": (
        r"hounsfield",
        r"\d+ ?(?-i:HU)",
        r"(?:lung|bone|soft[- ]tissue) windows?",
        r"hypo-?dens(?:e|ity|ities)",  # the opposite is also used for radiographs
        r"(?:hypo|hyper)-?attenuat\w+",
    ),
    "mri": (
        r"(?-i:T[12]) (?:(?:hyper|hypo|iso)-?inten\w+|bright\w*|dark|signal\w*|sequences?|images?)",
        r"(?:hyper|hypo|iso)-?intens(?:e|ity|ities)",
        r"restricted diffusion",
        r"(?<!mild )(?<!moderate )(?<!severe )(?<!trace )(?-i:MR)(?!\.)",
    ),
    "ultrasound": (
        r"(?:hypo|hyper|iso|an|non)-?echoic",
        r"(?:hypo|hyper)?echogenic(?:ity)?",
        r"echotexture",
        r"acoustic (?:shadow|enhancement)\w*",
    ),
    "histopathology": (
        r"(?:immuno)?stain(?:s|ed|ing)?",
        r"eosin(?:ophilic)?",
        r"mitos[ei]s|mitotic (?:figures?|activity)",
        r"(?:hyperchromatic|pleomorphic|atypical|vesicular|bland) nuclei",
    ),
    "fundus": (
        r"retinas?",
        r"retinal",
        r"macula[er]?",
        r"fovea\w*",
        r"optic (?:nerve head|dis[ck])s?",
        r"cup[- ]to[- ]dis[ck]",
    ),
}


def _words(least: int, most: int, never: str = "", commas: bool = False) -> str:
    """Returns a pattern of `least` to `most` words and what follows each, none of them matching `never`."""
    unwanted = rf"(?!(?:{never})\b)" if never else ""
    return rf"(?:{unwanted}[\w']+[{',' if commas else ''} :/()-]+){{{least},{most}}}"


# Words before and after a mention that indicate the present study.
_OWN = "this|these|current|present|today|axial|coronal|sagittal"
_TELLS = "shows?|showed|showing|demonstrat\\w+|reveal\\w+|depict\\w+|findings?|features?|appearances?|evidence"
_ASKED = "recommended|suggested|advised|warranted|requested|ordered|scheduled|helpful|useful|beneficial|informative"

# Mentions (§ in the sentence) of an earlier or another study, which are ignored.
_ANOTHER: tuple[str, ...] = (
    rf"\b(?:compar(?:ed|ing|ison|e|able)|correlat\w+|relative to|since|similar to|unlike) {_words(0, 6, _OWN)}§",
    r"\bcompar(?:ed|ison)\s*:.*§",
    rf"§[ :/()-]+{_words(0, 4)}(?:for|as) comparison\b",
    r"§ correlat",
    rf"\b(?:prior|previous|preceding|earlier|old|outside|recent|last|separate|concurrent|same[- ]day)"
    rf"[ :]+{_words(0, 3, _OWN)}§",
    rf"\bpreviously {_words(0, 8, _OWN)}§",
    # A plane, or the word image, indicates that the image itself is meant.
    rf"\b(?:seen|noted|identified|demonstrated|visuali[sz]ed|described|reported|shown|detected|documented|known|found"
    rf"|appreciated|not present) (?:on|by|at|in|from|with) {_words(0, 4, _OWN)}§(?! (?:image|slice|section)s?\b)",
    rf"\b(?:history of|review of|see|refer to|prior to|clearance for|safe for|contraindication (?:to|for)) "
    rf"{_words(0, 4, _OWN)}§",
)
# Mentions of a study that is only recommended, was not performed, or served another purpose.
_NOT_MADE: tuple[str, ...] = (
    rf"\b(?:recommend\w*|suggest|suggested|advised?|consider|consideration|request\w*|propose\w*|obtain|schedul\w*"
    rf"|pending|await\w*|warrants?|requires?|repeat|additional|dedicated) {_words(0, 10, commas=True)}§",
    rf"\bfurther {_words(0, 1)}(?:\w+ation|imaging|assessment|work-?up|study) {_words(0, 5, commas=True)}§",
    rf"\b(?:evaluat|assess|characteri[sz]|confirm|follow|investigat|proven|diagnos)\w*(?:-up| up| further)? "
    rf"(?:with|by|on|via|using|at) {_words(0, 4, _OWN)}§",
    rf"\bfollow[- ]?up {_words(0, 3, _OWN)}§(?! {_words(0, 4)}(?:{_TELLS})\b)",
    rf"§[ :/()-]+{_words(0, 8, _TELLS)}(?:{_ASKED})\b",
    rf"§[ :/()-]+{_words(0, 6, _TELLS)}(?:may|might|could|would|should|can) (?:also |further |better )*"
    r"(?:be|help|add|show|reveal|demonstrate|provide|characteri[sz]e|evaluate|exclude|assist|clarify|confirm|assess)\b",
    rf"§[ :/()-]+{_words(0, 4, _TELLS)}(?:if|as|when) (?:clinically )?"
    r"(?:indicated|warranted|needed|necessary|required)\b",
    rf"§[ :/()-]+{_words(0, 3, _TELLS)}(?:(?:is|are|was|were) )?(?:not )?(?:un)?available\b",
    rf"§[ :/()-]+{_words(0, 2, _TELLS)}(?:is|are) (?:more|most|less|better|best|superior)\b",
    rf"\b(?:no|without|lack of|absence of) (?:\w+ )?§(?! {_words(0, 1)}(?:evidence|finding|sign|abnormal|feature))",
    r"\bif §",
    r"§[- ](?:guid|proven|confirmed)",
)


def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})(?!\w)", re.IGNORECASE)


# Names first; specific words only if no technique is named. "No hypoechoic nodule" still indicates ultrasound.
_EVIDENCE = tuple(
    ({modality: _any_of(words) for modality, words in table.items()}, re.compile("|".join(elsewhere), re.IGNORECASE))
    for table, elsewhere in ((_NAMED, _ANOTHER + _NOT_MADE), (_SHOWN, _ANOTHER))
)
# Of a sentence that mentions modalities very often or is very long: beyond what people write, and never slow.
_MOST_MENTIONS = 50
_REACH = 500  # characters before and after a mention
_SENTENCE_END = re.compile(r"(?<=[.;!?])\s+|\n+")


def modality_from_text(text: str) -> str | None:
    """Returns the modality that a caption or report indicates.

    Args:
        text: A caption or report in English.

    Returns:
        `"xray"`, `"ct"`, `"mri"`, `"ultrasound"`, `"histopathology"` or `"fundus"`; None if the text indicates no
        modality, several, or another technique (such as OCT or PET).

    Example:
        >>> from medmoe_hf.data.modality_words import modality_from_text
        >>> modality_from_text("Axial CT of the chest, compared with the previous radiograph.")
        'ct'
    """
    sentences = _SENTENCE_END.split(text)
    for patterns, elsewhere in _EVIDENCE:
        found = {
            modality
            for modality, pattern in patterns.items()
            if any(not elsewhere.search(marked) for marked in _marked(sentences, pattern))
        }
        if found:
            modality = found.pop()
            return None if found or modality == _OTHER else modality
    return None


def _marked(sentences: list[str], pattern: re.Pattern[str]) -> Iterator[str]:
    """Yields each sentence, or the part of a long one, once per match of `pattern`, with the match replaced by §."""
    for sentence in sentences:
        for match in islice(pattern.finditer(sentence), _MOST_MENTIONS):
            start, end = match.span()
            yield f"{sentence[max(0, start - _REACH) : start]}§{sentence[end : end + _REACH]}"
