// Runs the script of the status page on a page of stubs: node status_page.mjs PAGE < answers of /status, a JSON list of
// [status code, body]. Prints what the page shows after each of them, as a JSON list.
import { readFileSync } from "node:fs";

class Element {
  constructor(tag) {
    Object.assign(this, { tag, own: "", children: [], attributes: {}, style: {}, className: "", hidden: false, title: "" });
  }
  get cells() { return this.children; }
  get textContent() { return [this.own, ...this.children.map(child => child.textContent)].filter(text => text).join(" "); }
  set textContent(text) { this.own = String(text); this.children = []; }
  append(...nodes) { this.children.push(...nodes); }
  replaceChildren(...nodes) { this.children = nodes; }
  insertRow() { return this.add("tr"); }
  insertCell() { return this.add("td"); }
  add(tag) { this.append(new Element(tag)); return this.children.at(-1); }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener() {}
}

const page = readFileSync(process.argv[2], "utf8");
const elements = Object.fromEntries([...page.matchAll(/<(\w+)[^>]*\bid="([\w-]+)"/g)].map(([, tag, id]) => [id, new Element(tag)]));
const answers = JSON.parse(readFileSync(0, "utf8")), shown = [];
let next = null;
Object.assign(globalThis, {
  document: {
    getElementById: id => { if (!(id in elements)) throw new Error(`no element ${id}`); return elements[id]; },
    createElement: tag => new Element(tag),
  },
  sessionStorage: { getItem: () => null, setItem: () => {} },
  setTimeout: call => { next = call; },
  fetch: async () => {
    const [status, body] = answers.shift();
    if (status === 0) throw new Error("gone");
    return { status, ok: status === 200, json: async () => body };
  },
});
const script = page.match(/<script type="module">([\s\S]*)<\/script>/)[1].replace(/\nrefresh\(\);\s*$/, "\nglobalThis.again = refresh;");
await import("data:text/javascript," + encodeURIComponent(script));  // a module: its names cannot be those that a window has already
while (answers.length) {
  await globalThis.again();
  if (next === null) throw new Error("it does not ask again");
  const texts = Object.fromEntries(Object.entries(elements).map(([id, each]) => [id, each.hidden ? "" : each.textContent]));
  const rows = elements.requests.children.map(row => row.children.map(cell => cell.textContent));
  shown.push({ texts, rows, plot: elements.plot.attributes.points ?? "" });
}
console.log(JSON.stringify(shown));
