"""Talk instead of a note: refusals, apologies, words to the asker, and remarks about the note, its text or its author.

Only what is said about the lesion and the patient makes a note. Whoever reads of "you", thanks, offers, disclaimers or
"the facts above" reads a conversation. Plain phrases are in `terms.yaml` (`refusals`); here is what has a grammar.
"""

from __future__ import annotations

import re

from dermfm.notes.claims import found_words

# What one refuses to do, without verbs that a finding may have as its subject ("dermoscopy could not confirm").
DEED = (
    "provide|give|offer|assist|help|write|generate|create|produce|complete|comply|fulfil|fulfill|comment|"
    "interpret|analy[sz]e|diagnose|answer|respond(?! to (?:\\w+ ){0,2}(?:treatment|therap|drug|medic))|discuss|"
    "process|access|open|have access|engage|continue|proceed|"
    "share|disclose|draft|compose|supply|summari[sz]e|describe|examine images|view images|accept|carry out"
)
CANNOT = (
    "can't|cannot|can not|(?:could|may|do|does|did|will|would)(?: not|n't)|won't|unable to|not able to|"
    r"declin\w+ to|refus\w+ to|not (?:allowed|permitted|authori[sz]ed|qualified|possible|appropriate|comfortable|"
    "equipped|trained)(?: for me)? to|inappropriate (?:for me )?to|impossible (?:for me )?to"
)
OWN_WILL = (
    r"(?:'m| am| are|'re) (?:sorry|afraid|not|unable|glad|happy|more than happy|pleased|delighted|grateful|here to|"
    r"ready|writing|sending|reaching|looking forward|going to|able|designed|programmed|trained)|"
    r"(?:'ll| will) (?:now |then |also |just |gladly )?(?:add|provide|describe|give|write|explain|summari[sz]e|help|"
    r"try|need|be|include|draft)|(?:'d|would) (?:be|like|love|need|appreciate)|"
    r" (?:need|hope|apologi[sz]e|regret|appreciate|understand|assume|wish|trust|look forward|must|lack)|"
    r"(?:'ve| have) (?:used|included|written|summari[sz]ed|provided|added|kept|omitted|avoided|followed|tried|"
    r"prepared|drafted|no )| (?:was|were) (?:not )?(?:given|asked|told|provided)|"
    r" (?:have not|haven't|do not|don't|did not|didn't|cannot|can't|could not|couldn't|won't|will not)"
)
TEXT = (
    "notes?|texts?|case reports?|case stud(?:y|ies)|records? for|statements?|(?<!on the )lists?|items?|"
    "outputs?|write-ups?|"
    "responses?|answers?|summary|paragraph|draft|facts|prompt|instructions?|requests?|input|message|document|"
    "wording|template|format|information|data|articles?|page|passage|sentences?|word count|query|conversation"
)
KIND_OF_TEXT = (
    "clinical|medical|brief|short|concise|above|following|below|given|provided|original|final|revised|detailed|"
    "complete|whole|entire|available|supplied|patient|listed|two|three|first|last|only"
)
PICTURE = "image|picture|photo|photograph|scan|information|data|details|context|facts|file|attachment"
TALK = tuple(
    re.compile(pattern)
    for pattern in (
        r"\b(?:you|your|yours|yourself)(?:'(?:re|d|ll|ve))?(?![\w-])",
        rf"\b(?:{CANNOT}) (?:\w+ly )?(?:{DEED})\b",
        rf"(?<![\w-])(?:i|we)(?:{OWN_WILL})\b",
        rf"\b(?:this|the|these|those|all) (?:(?:{KIND_OF_TEXT}) )*(?:{TEXT})\b",
        rf"\b(?:a|an|one) (?:(?:{KIND_OF_TEXT}) )+(?:{TEXT})\b",
        rf"\b(?:no|without (?:an?|any|the)|insufficient|not enough|more|additional|further) (?:\w+ )?(?:{PICTURE})s?"
        r"(?: \w+){0,6} (?:provided|attached|supplied|uploaded|shared|needed|required|to (?:make|write|give|assess|"
        r"describe|diagnose|provide|"
        r"complete|determine|help|say|confirm|go on))\b",
        rf"\b(?:{PICTURE}) (?:was|were|is|has been|have been) (?:not|never) (?:provided|attached|supplied|uploaded|"
        rf"available|shared|visible)\b",
        r"\b(?:nothing|no (?:note|diagnosis|description|assessment|statement|comment|opinion|conclusion|"
        r"answer)) (?:can|could|will|may) be\b",
        r"\b(?:not possible|impossible) to (?:write|describe|assess|say (?:more|anything|whether|if|what)|diagnose|"
        r"determine|provide|comment|tell|give|"
        r"make)\b",
        r"\b(?:note|answer|summary|request|instruction)s? (?:cannot|can't|could not|will not) be\b|\bword count\b",
        # whoever speaks of writing speaks of the note
        r"(?<!he )(?<!patient )\b(?:writ(?:e|es|ing|ten)|draft(?:ed|ing)|composing|automated|automatically|"
        r"generated|summari[sz](?:e|ing|"
        r"ed))\b",
        r"\b(?:my|our) (?:place|remit|role|abilit\w+|capabilit\w+|knowledge|guidelines|polic\w+|programming|"
        r"instructions|"
        r"understanding|purpose|training|scope|function|pleasure)\b|\b(?:beyond|outside)(?: of)? (?:the|my|our|"
        r"what) (?:scope|remit|i)\b",
        r"\bas an? (?:[\w-]+ )*(?:model|assistant|system|program|bot)\b",
        r"\bnothing (?:else |more )?(?:was|has been|is|were) (?:added|invented|omitted|left out|changed)\b",
        r"\bin (?:one|two|three|four|five|\d) (?:\w+ )?(?:sentences?|words|lines|paragraphs?)\b|\bunnecessary words\b",
        r"\b(?:one|two|three|single)-(?:sentence|paragraph|line)\b|\bin plain (?:language|english|words|prose)\b",
        r"\bour (?:\w+ )?(?:team|research|facilit\w+|staff|program\w*|mission|work)\b|\b(?:best|kind|warm) wishes\b",
        r"\b(?:thanks|thank you|apolog\w+|sorry|feel free|regards|sincerely|let me|hello|hi|greetings|"
        r"good (?:morning|day)|dear)\b",
        r"\b(?:ai|language model|chatbot|virtual assistant|training data|artificial intelligence)\b",
        r"\b(?:disclaimer|(?:educational|informational|illustrative|illustration) purposes|(?:medical|"
        r"professional) advice|please)\b",
        r"\bleave (?:\w+ ){1,6}to an? (?:\w+ )?(?:doctor|physician|dermatologist|specialist|professional|clinician|"
        r"expert)\b",
        r"\b(?:rather|prefer) not (?:to )?(?:commit|say|answer)\b|\bnot proofread\b|"
        r"\bhappy to help\b|\bthe (?:correct |right )?answer is\b",
        r"\b(?:substitute|replacement) for\b|\bnot (?:a|an) (?:\w+ )?(?:diagnosis by|consultation)\b",
        r"^\W*(?:and )?my name is\b|\bi(?:'m| am) an? (?:\w+ )?(?:dermatologist|doctor|physician|clinician|nurse|"
        r"student)\b",
        r"^(?:always )?(?:consult|contact|seek|ask|speak (?:to|with)|talk to|visit|see|discuss)(?: with)? (?:an?|the|"
        r"your|professional|medical|expert)\b",
        r"^\W*(?:got it|end of|sure|certainly|of course|absolutely|okay|ok|great|alright|understood|here (?:is|are|"
        r"you)|here's|"
        r"below|hope)\b",
        r"\[[a-z][^\]]*\]",
        r"\?\W*$",
    )
)


def talk(clean: str) -> list[str]:
    """The phrases by which a normalised sentence is talk; [] for a sentence about the lesion."""
    return [*found_words(clean, "refusals"), *(m[0].strip() for pattern in TALK if (m := pattern.search(clean)))]
