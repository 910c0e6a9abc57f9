"use strict";
// Tooltips of marks, and folds that open for print.
const tip = document.getElementById("tip");

let shown = null;

function showTip(mark) {
  shown = mark;
  tip.hidden = mark === null;
  if (mark === null) return;
  tip.textContent = mark.dataset.tip;
  const at = mark.querySelector(".target").getBoundingClientRect(), own = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(innerWidth - own.width - 4, at.left + at.width / 2 - own.width / 2)) + "px";
  tip.style.top = (at.top > own.height + 8 ? at.top - own.height - 4 : at.bottom + 4) + "px";
}
const markOf = event => event.target.closest ? event.target.closest(".mark") : null;
for (const kind of ["mouseover", "focusin", "click"])
  document.addEventListener(kind, event => { const mark = markOf(event); if (mark || kind === "click") showTip(mark); });
for (const kind of ["mouseout", "focusout"]) document.addEventListener(kind, event => { if (markOf(event)) showTip(null); });
document.addEventListener("keydown", event => { if (event.key === "Escape") showTip(null); });
addEventListener("scroll", () => showTip(shown), { passive: true });  // a mark that gets the focus scrolls into view

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const fold of opened) fold.open = true;
});
addEventListener("afterprint", () => { for (const fold of opened) fold.open = false; });

// Tables that are wider than the page say so.
function measure() {
  for (const box of document.querySelectorAll(".scroll")) box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
}
addEventListener("resize", measure);
document.addEventListener("toggle", measure, true);  // tables in folds have no width before
measure();
