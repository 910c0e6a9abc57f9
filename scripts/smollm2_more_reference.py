"""Packages of reference text and some prose that only train, pinned, with their licences."""

from __future__ import annotations

from smollm2_parts import CODE, REFERENCE, SPEECH, manuals, reference, sphinx
from smollm2_sources import TESTS, Package, Part

NOT_TOLD = ("*/CREDITS*", "*/changelog*", "*/fr/*", "*/de/*")  # of a game's files


MORE_REFERENCE: tuple[Package, ...] = (
    # reference: manuals in HTML
    Package(
        "debian", "zsh-doc", "5.9-4", "Zsh (MIT-like), GPL-2+",
        reference("html", "*/html/*.html", without=("*_toc*", "*-Index*")),
    ),
    Package("debian", "bash-doc", "5.2.15-2", "GPL-3+, GFDL-1.3", reference("html", "*/bashref.html")),
    Package("debian", "octave-doc", "7.3.0-2", "GPL-3+", reference("html", "*/octave.html/*.html")),
    Package("debian", "apache2-doc", "2.4.71-1~deb12u1", "Apache-2.0", reference("html", "*/manual/en/*.html")),
    Package("debian", "haproxy-doc", "2.6.12-1+deb12u4", "GPL-2+", reference("html", "*/haproxy/html/*.html")),
    Package("debian", "exim4-doc-html", "4.96-1", "GPL-2", reference("html", "*/spec_html/*.html")),
    Package(
        "debian", "postfix-doc", "3.7.11-0+deb12u1", "IPL-1.0 or EPL-2.0",
        reference("html", "*/html/*_README.html", "*/html/*.5.html", "*/html/*.8.html"),
    ),
    Package("debian", "r-doc-html", "4.2.2.20221110-2", "GPL-2", reference("html", "*/manual/*.html")),
    Package(
        "debian", "libglib2.0-doc", "2.74.6-2+deb12u9", "LGPL-2.1+",
        reference("html", "*/html/glib/*.html", "*/html/gobject/*.html", without=("*-index-*", "*index-all*")),
    ),
    Package(
        "debian", "installation-guide-amd64", "20230508+deb12u1", "GPL-2",
        reference("html", "*/amd64/en/*.html", "*-amd64/en/*.html"),
    ),
    Package("debian", "aptitude-doc-en", "0.8.13-5", "GPL-2+", reference("html", "*/html/en/*.html")),
    Package(
        "debian", "swi-prolog-doc", "9.0.4+dfsg-2", "BSD-2-Clause",
        reference("html", "*/Manual/*.html", "*/packages/*.html"),
    ),
    Package(
        "debian", "gap-doc", "4.12.1-2", "GPL-2+",
        reference("html", "*/ref/chap[0-4]?.html", "*/tut/chap?.html", without=("*_mj*",)),
    ),
    Package(
        "debian", "libvirt-doc", "9.0.0-4+deb12u2", "LGPL-2.1+",
        reference("html", "*/html/*.html", without=("*/html/html/libvirt-virterror*",)),
    ),
    Package(
        "debian", "xen-doc", "4.17.7+13-g2445b30a44-0+deb12u1", "GPL-2",
        reference("html", "*/html/misc/*.html", "*/html/man/*.html", "*/html/designs/*.html", "*/html/features/*.html"),
    ),
    Package(
        "debian", "libreoffice-help-en-us", "4:7.4.7-1+deb12u14", "MPL-2.0",
        reference("html", "*/text/scalc/*.html", "*/text/swriter/*.html"),
    ),
    Package("debian", "gimp-help-en", "2.10.34-2", "GFDL-1.2+", reference("html", "*/help/en/*.html")),
    Package("debian", "scons-doc", "4.4.0+dfsg-1", "MIT", reference("html", "*/HTML/*.html")),
    Package("debian", "kicad-doc-en", "6.0.11+dfsg-1", "GPL-3+ or CC-BY-3.0", reference("html", "*/help/en/*.html")),
    Package("debian", "ncurses-doc", "6.4-4", "MIT/X11", reference("html", "*/html/*.html")),
    Package("debian", "grass-doc", "8.2.1-1", "GPL-2+", reference("html", "*/html/*.html", without=("*/index*", "*/keywords*"))),
    Package("debian", "weechat-doc", "3.8-1", "GPL-3+", reference("html", "*.en.html")),
    Package(
        "debian", "fp-docs-3.2.2", "3.2.2+dfsg-20", "LGPL-2+",
        reference("html", "*/user/user.html", "*/ref/ref.html", "*/prog/prog.html"),
    ),
    Package(
        "debian", "wireshark-doc", "4.0.17-0+deb12u3", "GPL-2+",
        reference("html", "*/wsug_html_chunked/*.html", "*/wsdg_html_chunked/*.html"),
    ),
    Package("debian", "racket-doc", "8.7+dfsg1-1", "MIT or Apache-2.0", reference("html", "*/racket/guide/*.html")),
    Package("debian", "maxima-doc", "5.46.0-11", "GPL-2", reference("html", "*/html/maxima_[1-2]*.html")),
    Package("debian", "slurm-wlm-doc", "22.05.8-4+deb12u3", "GPL-2+", reference("html", "*/html/*.html")),
    Package(
        "debian", "erlang-doc", "1:25.2.3+dfsg-1+deb12u4", "Apache-2.0",
        reference("html", "*/kernel-*/*.html", "*/kernel-*/doc/html/*.html"),
    ),
    Package(
        "debian", "tcllib", "1.21+dfsg-1", "TCL",
        (
            Part("reference", "train", "html", ("*/doc/tcllib/html/*.html",), (), REFERENCE),
            Part("code", "train", "code", ("*/tcllib1.21/*.tcl",), ("*/pkgIndex*", "*/rtcore*"), CODE),
        ),
    ),
    Package(
        "debian", "libx11-doc", "2:1.8.4-2+deb12u2", "MIT/X11",
        reference("html", "*/libX11/libX11.html", "*/XKB/xkblib.html"),
    ),
    Package("debian", "gnuplot-doc", "5.4.4+dfsg1-2", "gnuplot", reference("html", "*/htmldocs/*.html")),
    Package("debian", "debian-history", "2.28", "GPL-2+", (Part("prose", "train", "html", ("*.en.html",)),)),
    Package("debian", "harden-doc", "3.19+nmu1", "GPL-2+", reference("html", "*/html/en*/*.html", "*/harden-doc/html/*.en.html")),
    Package("debian", "debian-faq", "11.1", "copyleft of its own", reference("html", "*.en.html")),
    Package("debian", "debian-edu-doc-en", "2.12.23~deb12u1", "GPL-2+", reference("html", "*.html")),
    # reference: manual pages, plain text, dictionaries
    Package("debian", "tcl8.6-doc", "8.6.13+dfsg-2", "TCL", manuals("3")),
    Package("debian", "tk8.6-doc", "8.6.13-2", "TCL", manuals("3")),
    Package("debian", "libssl-doc", "3.0.22-1~deb12u2", "Apache-2.0", manuals("3", "7")),
    Package("debian", "libcurl4-doc", "7.88.1-10+deb12u15", "curl (MIT-like)", manuals("3")),
    Package("debian", "systemd", "252.39-1~deb12u2", "LGPL-2.1+", manuals("1", "5", "7", "8")),
    Package("debian", "util-linux", "2.38.1-5+deb12u3", "GPL-2+", manuals("1", "5", "8")),
    Package("debian", "openmpi-doc", "4.1.4-3", "BSD-3-Clause", manuals("3")),
    Package("debian", "netpbm", "2:11.01.00-2", "GPL-2+ and MIT-like", manuals("1", "5")),
    Package("debian", "samba-common-bin", "2:4.17.12+dfsg-0+deb12u4", "GPL-3+", manuals("1", "5", "8")),
    Package("debian", "ocaml-man", "4.13.1-4", "LGPL-2.1 with linking exception", manuals("3")),
    Package("debian", "binutils-doc", "2.40-2", "GFDL-1.3+ without invariant sections", reference("plain", "*/info/*.info.gz")),
    Package("debian", "c++-annotations-txt", "12.2.0-2", "GPL-2+", reference("plain", "*/cplusplus.txt.gz")),
    Package("debian", "rsyslog-doc", "8.2302.0+dfsg-1", "Apache-2.0, GFDL-1.2+", reference("plain", "*/_sources/*.rst.txt")),
    Package("debian", "icinga2-doc", "2.13.6-2+deb12u2", "GPL-2+", reference("plain", "*/markdown/*.md.gz")),
    Package("debian", "squid-common", "5.7-2+deb12u6", "GPL-2+", reference("plain", "*/squid.conf.documented*")),
    Package("debian", "dovecot-core", "1:2.3.19.1+dfsg1-2.1+deb12u7", "LGPL-2.1, MIT", reference("plain", "*/wiki/*.txt.gz")),
    Package(
        "debian", "doc-debian", "11.3+nmu1", "GPL-2+",
        (Part("prose", "train", "plain", ("*/doc/debian/*.txt.gz", "*/doc/debian/*.txt"), ("*social-contract*",)),),
    ),
    Package("debian", "dict-foldoc", "20230119-1", "GFDL-1.1+", reference("plain", "*/foldoc.dict.dz")),
    Package("debian", "dict-gcide", "0.48.5+nmu2", "GPL-3+", reference("plain", "*/gcide.dict.dz")),
    Package("debian", "dict-wn", "1:3.0-37", "WordNet (BSD-like)", reference("plain", "*/wn.dict.dz")),
    Package("debian", "dict-devil", "1.0-13.1", "public domain", (Part("prose", "train", "plain", ("*/devil.dict.dz",)),)),
    Package(
        "debian", "crawl-common", "2:0.28.0-1.1", "GPL-2+",
        (
            Part("prose", "train", "plain", ("*/dat/descript/*.txt", "*/docs/*.txt"), NOT_TOLD),
            Part("dialogue", "train", "plain", ("*/dat/database/*.txt",), ("*/database/??/*",), SPEECH),
            Part("code", "train", "code", ("*/dat/*.lua",), (), CODE),
        ),
    ),
    Package("debian", "nethack-common", "3.6.6-3+b2", "NGPL", (Part("prose", "train", "plain", ("*/Guidebook.txt.gz",)),)),
    Package(
        "debian", "angband-data", "1:3.5.1-2.5", "GPL-2",
        (Part("prose", "train", "plain", ("*/help/*.txt", "*/edit/monster.txt"), ("*/version*",)),),
    ),
    # reference: documentation in source packages and npm packages
    Package("pypi-source", "tornado", "6.6.1", "Apache-2.0", sphinx()),
    Package("pypi-source", "salt", "3008.5", "Apache-2.0", sphinx()),
    Package("pypi-source", "buildbot", "4.3.0", "GPL-2", sphinx("*/docs/*.rst", "*.rst")),
    Package(
        "pypi-source", "mercurial", "7.2.4", "GPL-2+",
        reference("plain", "*/mercurial/helptext/*.txt", "*/mercurial/help*/*.txt", "*/doc/*.txt"),
    ),
    Package("pypi-source", "docutils", "0.23", "public domain, BSD-2-Clause", sphinx("*/docs/*.rst", "*/docs/*.txt")),
    Package("pypi-source", "nova", "34.0.0", "Apache-2.0", sphinx()),
    Package("pypi-source", "neutron", "29.0.0", "Apache-2.0", sphinx()),
    Package("pypi-source", "swift", "2.38.3", "Apache-2.0", sphinx()),
    Package("pypi-source", "trio", "0.35.0", "MIT or Apache-2.0", sphinx()),
    Package("pypi-source", "ipython", "9.18.1", "BSD-3-Clause", sphinx()),
    Package("pypi-source", "aiohttp", "3.14.5", "Apache-2.0", sphinx()),
    Package("pypi-source", "pymongo", "4.20.1", "Apache-2.0", sphinx()),
    Package("pypi-source", "pygments", "2.21.0", "BSD-2-Clause", sphinx()),
    Package("pypi-source", "jinja2", "3.1.6", "BSD-3-Clause", sphinx()),
    Package("pypi-source", "babel", "2.19.0", "BSD-3-Clause", sphinx()),
    Package("pypi-source", "cython", "3.3.1", "Apache-2.0", sphinx("*/docs/*.rst")),
    Package("pypi-source", "beets", "2.14.1", "MIT", sphinx()),
    Package("pypi-source", "sympy", "1.14.0", "BSD-3-Clause", sphinx()),
    Package("pypi-source", "pylint", "4.1.4", "GPL-2+", sphinx("*/doc/*.rst")),
    Package("pypi-source", "cinder", "29.0.0", "Apache-2.0", sphinx()),
    Package("pypi-source", "keystone", "30.0.0", "Apache-2.0", sphinx()),
    Package("pypi-source", "nikola", "8.3.3", "MIT", sphinx()),
    Package(
        "npm", "fastify", "5.12.8", "MIT",
        (
            Part("reference", "train", "plain", ("package/docs/*.md",), (), REFERENCE),
            Part("code", "train", "code", ("package/lib/*.js", "package/*.js"), TESTS, CODE),
        ),
    ),
    Package(
        "npm", "foundation-sites", "6.9.0", "MIT",
        (
            Part("reference", "train", "plain", ("package/docs/pages/*.md",), (), REFERENCE),
            Part("code", "train", "code", ("package/scss/*.scss",), (), CODE),
        ),
    ),
    Package("npm", "@mui/material", "9.5.0", "MIT", reference("plain", "package/docs/*.md")),
    Package("npm", "aws-cdk-lib", "2.276.0", "Apache-2.0", reference("plain", "package/aws-*/README.md", "package/*/README.md")),
    Package("npm", "pino", "10.4.0", "MIT", reference("plain", "package/docs/*.md")),
    Package("npm", "gatsby", "5.16.1", "MIT", reference("plain", "package/CHANGELOG.md")),
    Package(
        "npm", "leaflet", "1.9.4", "BSD-2-Clause",
        (
            Part("reference", "train", "plain", ("package/CHANGELOG.md",), (), REFERENCE),
            Part("code", "train", "code", ("package/src/*.js",), (), CODE),
        ),
    ),
    Package("npm", "@types/vscode", "1.140.0", "MIT", reference("plain", "*/index.d.ts")),
    Package("npm", "electron", "41.7.1", "MIT", reference("plain", "package/electron.d.ts")),
    Package("npm", "playwright-core", "1.65.1", "Apache-2.0", reference("plain", "package/types/types.d.ts")),
    Package("npm", "@octokit/openapi-types", "29.0.1", "MIT", reference("plain", "package/types.d.ts")),
    Package("npm", "csstype", "3.2.4", "MIT", reference("plain", "package/index.d.ts")),
    Package("npm", "aws-sdk", "2.1693.0", "Apache-2.0", reference("plain", "package/clients/[d-k]*.d.ts")),
    Package("npm", "mdn-data", "2.37.2", "CC0-1.0", reference("plain", "package/css/*.json", "package/api/*.json")),
    Package(
        "npm", "vega-lite", "6.4.3", "BSD-3-Clause",
        (
            Part("reference", "train", "plain", ("package/build/vega-lite-schema.json",), (), REFERENCE // 2),
            Part("code", "train", "code", ("package/src/*.ts",), TESTS, CODE),
        ),
    ),
)  # fmt: skip
