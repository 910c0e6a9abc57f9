// What the heads read: one step, layer and KV head at a time.
(() => {
  const record = JSON.parse(document.getElementById("selections").textContent);
  const $ = id => document.getElementById(id);
  const { texts, steps, layers, sink, recent } = record;
  const SVG = "http://www.w3.org/2000/svg", SHADES = [0.001, 0.005, 0.02, 0.08], LISTED = 10;
  const percent = share => (100 * share).toFixed(1) + " %";
  const count = n => n.toLocaleString("en");

  const spans = texts.map((text, place) => {
    const span = document.createElement("span");
    span.textContent = text.replace(/\n/g, "↵\n") || "∅";
    span.title = "token " + count(place);
    $("tokens").append(span);
    return span;
  });
  function option(select, value, text) {
    const made = document.createElement("option");
    made.value = value; made.textContent = text;
    select.append(made);
  }
  layers.forEach((layer, place) => option($("layer"), place, layer));
  record.readers[0].forEach((_, head) => option($("head"), head, head));
  $("step").max = steps.length - 1;

  function placesOf(set, length) {
    if (set === null) return Array.from({ length }, (_, place) => place);
    let place = -1;
    return set.map(gap => place += gap);
  }
  function draw(parent, name, attributes) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent.append(made);
  }

  function show() {
    const number = +$("step").value, layer = +$("layer").value, head = +$("head").value;
    const step = steps[number], own = step.heads[layer][head], length = step.length;
    const read = new Set(placesOf(own.set === -1 ? null : step.sets[own.set], length));
    const mass = new Map(own.top.map((place, rank) => [place, own.mass[rank] / 10000]));
    spans.forEach((span, place) => {
      const weight = mass.get(place) || 0, shade = SHADES.filter(least => weight >= least).length;
      const kinds = ["token"];
      if (read.has(place)) kinds.push(place < sink || place >= length - recent ? "always" : "read");
      else if (shade > 1) kinds.push("missed");
      if (place >= record.prompt_tokens) kinds.push("made");
      if (place === length - 1) kinds.push("newest");
      if (place >= length) kinds.push("later");
      span.className = kinds.join(" ");
      if (shade) span.dataset.shade = shade; else delete span.dataset.shade;
    });
    const next = texts[length] === undefined ? "" : " It then writes “" + texts[length].trim() + "”.";
    const group = record.readers[layer][head];
    $("now").textContent = "Step " + (number + 1) + " of " + steps.length + ": the model looks at token " + count(length - 1) + " “" +
      texts[length - 1].trim() + "”. Layer " + layers[layer] + ", KV head " + head + (group === null ? "" : ", which reads the set of group " + group) +
      ", reads " + count(read.size) + " of " + count(length) + " tokens; they hold " + percent(own.recall) + " of its true attention." + next;
    $("step").setAttribute("aria-valuetext", "step " + (number + 1) + ", token " + texts[length - 1]);
    drawMap(read, mass, length);
    fillTop(read, own);
    drawRecalls(number, layer, head);
    const newest = spans[length - 1];
    if (newest) $("tokens").scrollTop = newest.offsetTop - $("tokens").clientHeight + 80;
  }
  function drawMap(read, mass, length) {
    $("map").replaceChildren();
    const width = 1000 / length;
    let first = null, last = null;
    const flush = () => { if (first !== null) draw($("map"), "rect", { x: first * width, y: 2, width: Math.max((last - first + 1) * width, 1), height: 24, fill: "var(--c0)" }); };
    for (const place of [...read].sort((a, b) => a - b)) {
      if (last !== null && place === last + 1) { last = place; continue; }
      flush(); first = last = place;
    }
    flush();
    for (const [place, weight] of mass) {
      const height = 26 * Math.min(1, Math.sqrt(weight) + 0.05);
      draw($("map"), "rect", { x: place * width, y: 54 - height, width: Math.max(width, 2), height, fill: "rgb(var(--shade))" });
    }
  }
  function fillTop(read, own) {
    const body = $("top").tBodies[0];
    body.replaceChildren();
    own.top.slice(0, LISTED).forEach((place, rank) => {
      const row = body.insertRow(), name = document.createElement("th");
      name.scope = "row"; name.textContent = texts[place].replace(/\n/g, "↵"); row.append(name);
      for (const text of [count(place), percent(own.mass[rank] / 10000), read.has(place) ? "yes" : "no"]) row.insertCell().textContent = text;
    });
  }
  function drawRecalls(number, layer, head) {
    const picture = $("recalls");
    picture.replaceChildren();
    const x = place => 40 + (steps.length > 1 ? place / (steps.length - 1) : 0.5) * 250, y = share => 76 - share * 62;
    for (const share of [0, 0.5, 1]) {
      draw(picture, "line", { class: "grid", x1: 40, x2: 292, y1: y(share), y2: y(share) });
      draw(picture, "text", { class: "tick", x: 36, y: y(share) + 4, "text-anchor": "end" });
      picture.lastChild.textContent = 100 * share + " %";
    }
    draw(picture, "text", { class: "axis", x: 40, y: 88 });
    picture.lastChild.textContent = "recall at every step";
    const shares = steps.map(step => step.heads[layer][head].recall);
    draw(picture, "polyline", { class: "line c0", points: shares.map((share, place) => x(place) + "," + y(share)).join(" ") });
    draw(picture, "circle", { class: "dot c0", cx: x(number), cy: y(shares[number]), r: 4.5 });
  }

  function go(by) {
    $("step").value = +$("step").value + by;
    show();
  }
  for (const id of ["step", "layer", "head"]) $(id).addEventListener("input", show);
  $("earlier").addEventListener("click", () => go(-1));
  $("later").addEventListener("click", () => go(1));
  let playing = null;
  $("play").addEventListener("click", () => {
    if (playing !== null) { clearInterval(playing); playing = null; $("play").textContent = "Play"; return; }
    if (+$("step").value === steps.length - 1) { $("step").value = 0; show(); }
    $("play").textContent = "Stop";
    playing = setInterval(() => { go(1); if (+$("step").value === steps.length - 1) $("play").click(); }, 700);
  });
  $("map").addEventListener("click", event => {
    const box = $("map").getBoundingClientRect(), length = steps[+$("step").value].length;
    const span = spans[Math.min(length - 1, Math.floor((event.clientX - box.left) / box.width * length))];
    $("tokens").scrollTop = span.offsetTop - $("tokens").clientHeight / 2;
  });
  show();
})();
