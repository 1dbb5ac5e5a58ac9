"""The authored templates of each mechanism, by split and side.

In evaluation templates no planted slot is next to punctuation, which would show its position to TF-IDF of characters
within words. The function in `mechanisms` that fills a template explains its field letters.
"""

from __future__ import annotations

from poolwise.demo.grammar import Templates

FACT = Templates(
    train_queries=("the {q} {x} {v} in the {p}", "in the {p} there {v} a {q} {x}"),
    train_documents=("it was in the {p} that the {x} {v} , {q} as it was", "the {x} that {v} in the {p} was {q}"),
    eval_queries=("a {q} {x} {v} near the {p}", "near the {p} {v} the {q} {x}"),
    eval_documents=("by the {p} the {x} {v} , and it was {q}", "there was one {q} {x} which {v} at the {p}"),
)

ROLES = Templates(
    train_queries=(
        "the {a} {v} the {b} with the {c} to the {d}",
        "it was the {a} who {v} the {b} with the {c} to the {d}",
    ),
    train_documents=(
        "so the {a} had {v} the {b} , with the {c} , to the {d}",
        "by the {a} was the {b} with the {c} {v} to the {d}",
    ),
    eval_queries=(
        "here the {a} {v} the {b} and with it the {c} to the {d} too",
        "the {a} is the one who {v} the {b} with the {c} to the {d} then",
    ),
    eval_documents=(
        "from the {a} came the {b} who with the {c} was {v} to the {d} there",
        "by the {a} the {b} and the {c} had been {v} to the {d} there",
    ),
)

NUMBER = Templates(
    train_queries=(
        "the {p} had {a} {x} , {b} {y} , {c} {z} and {d} {w}",
        "{a} {x} , {b} {y} , {c} {z} and {d} {w} were in the {p}",
    ),
    train_documents=(
        "in the {p} the {x} were {a} , the {y} {b} , the {z} {c} , the {w} {d}",
        "{p} : {x} {a} ; {y} {b} ; {z} {c} ; {w} {d}",
    ),
    eval_queries=(
        "there are {a} {x} and {b} {y} and {c} {z} and {d} {w} at the {p} here",
        "the {p} has {a} {x} with {b} {y} and {c} {z} and {d} {w} in it",
    ),
    eval_documents=(
        "at the {p} {x} are {a} and {y} {b} while {z} are {c} and {w} {d} in all",
        "of {x} {a} and of {y} {b} and of {z} {c} and of {w} {d} are at the {p} there",
    ),
)

SWAP = Templates(
    train_queries=(
        "{a} had the {x} , {b} the {y} , {c} the {z} and {d} the {w}",
        "with {a} was the {x} , with {b} the {y} , with {c} the {z} , with {d} the {w}",
    ),
    train_documents=(
        "the {x} was for {a} , the {y} for {b} , the {z} for {c} , the {w} for {d}",
        "the {x} of {a} , the {y} of {b} , the {z} of {c} and the {w} of {d}",
    ),
    eval_queries=(
        "{a} has a {x} and {b} a {y} while {c} has a {z} and {d} a {w} too",
        "here is {a} with the {x} and {b} with the {y} and {c} with the {z} and {d} with the {w} too",
    ),
    eval_documents=(
        "a {x} is from {a} and a {y} from {b} while a {z} is from {c} and a {w} from {d} here",
        "to the {x} came {a} and to the {y} {b} and to the {z} {c} and to the {w} {d} too",
    ),
)

NEGATION = Templates(
    train_queries=(
        "the {p} had {m0} {x} , {m1} {y} , {m2} {z} , {m3} {w}",
        "there was {m0} {x} , {m1} {y} , {m2} {z} , {m3} {w} in the {p}",
    ),
    train_documents=(
        "in the {p} , the {x} was {n0} , the {y} {n1} , the {z} {n2} , the {w} {n3}",
        "{m0} {x} and {m1} {y} were in the {p} , and {m2} {z} and {m3} {w}",
    ),
    eval_queries=(
        "at the {p} there is {m0} {x} and {m1} {y} and {m2} {z} and {m3} {w} here",
        "{m0} {x} and {m1} {y} has the {p} , and {m2} {z} and {m3} {w} too",
    ),
    eval_documents=(
        "{m0} {x} or {m1} {y} is there , {m2} {z} or {m3} {w} is there , at the {p} too",
        "of the {p} this is all , {m0} {x} and {m1} {y} , then {m2} {z} and {m3} {w} too",
    ),
)

CONTEXT = Templates(
    train_queries=(
        "who {v} in the {p} : {m0} {x} , {m1} {y} , {m2} {z} , {m3} {w}",
        "{m0} {x} , {m1} {y} , {m2} {z} and {m3} {w} {v} in the {p}",
    ),
    train_documents=(
        "{x} ? {m0} . {y} ? {m1} . {z} ? {m2} . {w} ? {m3} . so they {v} in the {p}",
        "in the {p} , as they {v} , {x} {m0} , {y} {m1} , {z} {m2} and {w} {m3}",
    ),
    eval_queries=(
        "it was {m0} to {x} and {m1} to {y} and {m2} to {z} and {m3} to {w} who {v} at the {p} here",
        "at the {p} they {v} and it is {m0} for {x} and {m1} for {y} and {m2} for {z} and {m3} for {w} too",
    ),
    eval_documents=(
        "who {v} at the {p} then ? for {x} it is {m0} and for {y} {m1} and for {z} {m2} and for {w} {m3} too",
        "if {x} {v} at the {p} then {m0} and if {y} then {m1} and if {z} then {m2} and if {w} then {m3} too",
    ),
)

TAIL = Templates(
    train_queries=("the {a} {u} in the {p}", "it was the {a} that {u} , in the {p}"),
    train_documents=(
        "in the {p} the {a} {u} . {f} . then there was a {b} that {v} and a {c} that {w}",
        "there {u} a {a} in the {p} . as for the {b} , it {v} , and the {c} {w} . {f}",
    ),
    eval_queries=("a {a} {u} at the {p} here", "at the {p} there {u} the {a} too"),
    eval_documents=(
        "the {a} at the {p} {u} first . {f} . the {b} also {v} and the {c} also {w} there",
        "at the {p} a {a} {u} then . while a {b} {v} there the {c} {w} too . {f}",
    ),
)

TOPIC = Templates(
    train_queries=("of {a} , {b} and {c}", "with a {a} , a {b} and a {c}"),
    train_documents=("the {a} , the {b} and the {c}", "{a} and {b} , and then {c}"),
    eval_queries=("about {a} , {b} and {c}", "here {a} , there {b} , and {c}"),
    eval_documents=("on the {a} , on the {b} and on the {c}", "what of {a} , of {b} and of {c}"),
)
