"""One page of a report as HTML: everything inline, nothing fetched, nothing of the data ever markup.

The data stand in a script element that no browser runs, as JSON without "<"; the page's own script, the only
one that its content security policy allows, puts them in as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from typing import Any

from scale_wsl.corpus.judgements import FORMAT, VERDICTS, VERSION

__all__ = ["page"]


def page(data: dict[str, Any]) -> str:
    """The HTML of what `report._page_data` gives."""
    constants = {"format": FORMAT, "version": VERSION, "verdicts": list(VERDICTS)}
    text = json.dumps({**data, **constants}, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text, and browsers crash on it
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    title = f"{data['evaluation']['name']} in {data['train']['name']}: page {data['page']} of {data['pages']}"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{_BODY}"
        f'<script type="application/json" id="data">{text}</script>\n'
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --ground: light-dark(#f5f6f8, #14161a); --card: light-dark(#fff, #1d2026);
  --line: light-dark(#dfe3e8, #31363f); --text: light-dark(#1b1f24, #e6e9ee); --faint: light-dark(#667080, #98a2b3);
  --accent: light-dark(#2457c5, #7aa5ff); --duplicate: light-dark(#c2340c, #ff8a65);
  --not: light-dark(#2e7d32, #7bc47f); --unsure: light-dark(#8a6100, #e6b84c); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 14px/1.4 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header { position: sticky; top: 0; z-index: 2; background: var(--card); border-bottom: 1px solid var(--line);
  padding: 10px 20px; display: flex; flex-wrap: wrap; gap: 8px 24px; align-items: center; }
h1 { font-size: 16px; margin: 0; }
.method { color: var(--faint); font-size: 12px; }
.title { flex: 1 1 320px; min-width: 0; }
.control { display: flex; align-items: center; gap: 8px; white-space: nowrap; }
.control output { min-width: 3.2em; font-variant-numeric: tabular-nums; font-weight: 600; }
input[type=range] { width: 180px; accent-color: var(--accent); }
button, select, .file { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 4px 10px; cursor: pointer; }
button:hover, .file:hover { border-color: var(--accent); }
button.primary { background: var(--accent); border-color: var(--accent); color: light-dark(#fff, #10131a);
  font-weight: 600; }
.file input { position: absolute; opacity: 0; width: 1px; height: 1px; }
a { color: var(--accent); }
#counts { font-variant-numeric: tabular-nums; white-space: nowrap; }
#counts b.duplicate, .verdict.duplicate { color: var(--duplicate); }
#counts b.not, .verdict.not { color: var(--not); }
#counts b.unsure, .verdict.unsure { color: var(--unsure); }
#warning { background: var(--duplicate); color: light-dark(#fff, #10131a); padding: 6px 20px; }
#warning:empty { display: none; }
main { padding: 16px 20px 60px; display: grid; gap: 14px; }
.row { background: var(--card); border: 1px solid var(--line); border-radius: 10px; display: grid;
  grid-template-columns: 178px minmax(0, 1fr); min-height: 236px; scroll-margin-top: 120px; }
.row[hidden] { display: none; }
.query { padding: 14px; border-right: 1px solid var(--line); }
.strip { display: flex; gap: 10px; overflow-x: auto; padding: 14px; align-items: flex-start; }
figure { margin: 0; min-width: 0; }
.picture { width: 148px; height: 124px; display: grid; place-items: center; border-radius: 6px; overflow: hidden;
  background: repeating-conic-gradient(light-dark(#f0f1f3, #262a31) 0 25%, transparent 0 50%) 0 0/16px 16px; }
.picture img { max-width: 100%; max-height: 124px; display: block; }
.picture span { color: var(--faint); font-size: 12px; }
.tile { flex: none; width: 164px; padding: 6px; border: 2px solid transparent; border-radius: 8px; outline: none; }
.tile[hidden] { display: none; }
.tile:focus { border-color: var(--accent); }
.tile.duplicate { background: color-mix(in srgb, var(--duplicate) 16%, transparent); }
.tile.not { background: color-mix(in srgb, var(--not) 10%, transparent); }
.tile.not .picture { opacity: .55; }
.tile.unsure { background: color-mix(in srgb, var(--unsure) 16%, transparent); }
.key, .labels { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-size: 12px; }
.key { font-family: ui-monospace, "DejaVu Sans Mono", monospace; margin-top: 4px; }
.labels { color: var(--faint); }
.score { display: flex; align-items: center; gap: 6px; margin-top: 6px; font-variant-numeric: tabular-nums;
  font-weight: 600; }
.score i { flex: 1; height: 4px; border-radius: 2px; background: var(--line); overflow: hidden; }
.score i::before { content: ""; display: block; height: 100%; width: var(--share); background: var(--accent); }
.answers { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 4px; margin-top: 6px; }
.answers button { padding: 2px 0; font-size: 12px; }
.answers button[aria-pressed=true] { color: light-dark(#fff, #10131a); border-color: transparent; font-weight: 600; }
.answers .duplicate[aria-pressed=true] { background: var(--duplicate); }
.answers .not[aria-pressed=true] { background: var(--not); }
.answers .unsure[aria-pressed=true] { background: var(--unsure); }
.none { color: var(--faint); padding: 40px; text-align: center; }
footer { position: fixed; bottom: 0; left: 0; right: 0; background: var(--card); border-top: 1px solid var(--line);
  padding: 6px 20px; color: var(--faint); font-size: 12px; }
kbd { border: 1px solid var(--line); border-radius: 4px; padding: 0 5px; font: inherit; color: var(--text); }
"""

_BODY = """<header>
<div class="title"><h1 id="name"></h1><div class="method" id="method"></div></div>
<label class="control">similarity from <input type="range" id="threshold" min="0" max="1" step="0.005">
<output id="shown"></output></label>
<label class="control">show <select id="filter"><option value="all">all</option>
<option value="open">not judged yet</option>
<option value="duplicate">duplicates</option><option value="unsure">unsure</option></select></label>
<div id="counts" aria-live="polite"></div>
<div class="control"><span id="pages"></span>
<label class="file" tabindex="0">Load<input type="file" id="load" accept=".json,application/json"></label>
<button class="primary" id="save">Save judgements</button></div>
</header>
<div id="warning" role="alert"></div>
<main id="rows"></main>
<footer><kbd>D</kbd> duplicate &ensp;<kbd>N</kbd> not &ensp;<kbd>U</kbd> unsure &ensp;<kbd>X</kbd> undo &ensp;
<kbd>&larr;</kbd> <kbd>&rarr;</kbd> neighbours &ensp;<kbd>&uarr;</kbd> <kbd>&darr;</kbd> images &ensp;
<kbd>Shift</kbd>+<kbd>N</kbd> none of those shown, next image &ensp;<kbd>S</kbd> save</footer>
<noscript>Judging needs JavaScript; the neighbours are in neighbours.parquet, too.</noscript>
"""

_SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const place = "scale_wsl duplicates " + data.id;
const apart = "\n";
let kept = {}, keepsNothing = false;  // no storage, or it is full: this window alone remembers

function load() {
  if (keepsNothing) return kept;
  try { return JSON.parse(localStorage.getItem(place)) || {}; } catch { return kept; }
}
function keep(verdicts) {
  kept = verdicts;
  try { localStorage.setItem(place, JSON.stringify(verdicts)); }
  catch {
    keepsNothing = true;
    by("warning").textContent = "This browser keeps nothing more for this page: save before you close it.";
  }
}
function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}
function figure(name, key, labels, preview) {
  const made = element("figure", name), picture = element("div", "picture");
  if (data.previews[preview]) {
    const image = element("img");
    image.alt = key;
    image.src = "data:image/jpeg;base64," + data.previews[preview];
    picture.append(image);
  } else picture.append(element("span", "", "not readable"));
  const shown = element("div", "key", key), tags = element("div", "labels", labels || "\u00a0");
  shown.title = key; tags.title = labels;
  made.append(picture, shown, tags);
  return made;
}

// --- rows, built when they come near the window ---

const rows = data.rows.map((row, number) => {
  const section = element("section", "row");
  section.dataset.row = number;
  by("rows").append(section);
  return {row, section, tiles: null};
});
function build(entry) {
  if (entry.tiles) return;
  const {row, section} = entry, strip = element("div", "strip");
  section.append(figure("query", row.key, row.labels, row.preview), strip);
  entry.tiles = row.neighbours.map(([key, similarity, labels, preview], number) => {
    const tile = figure("tile", key, labels, preview);
    tile.tabIndex = -1;
    const score = element("div", "score", similarity.toFixed(3)), bar = element("i");
    bar.style.setProperty("--share", Math.max(0, Math.min(1, similarity)) * 100 + "%");
    score.append(bar);
    const answers = element("div", "answers");
    for (const verdict of data.verdicts) {
      const button = element("button", verdict, verdict === "duplicate" ? "dup" : verdict === "unsure" ? "?" : "not");
      button.title = verdict;
      button.tabIndex = -1;
      button.addEventListener("click", () => {
        judge(entry, number, verdictOf(load(), entry, number) === verdict ? null : verdict);
        tile.focus({preventScroll: true});
      });
      answers.append(button);
    }
    tile.append(score, answers);
    tile.addEventListener("focus", () => { current = [entry, number]; });
    strip.append(tile);
    return tile;
  });
  paint(entry, load());
}
const near = new IntersectionObserver(seen => {
  for (const {target, isIntersecting} of seen) if (isIntersecting) build(rows[+target.dataset.row]);
}, {rootMargin: "800px"});
rows.forEach(entry => near.observe(entry.section));

// --- verdicts ---

const pairOf = (entry, number) => entry.row.key + apart + entry.row.neighbours[number][0];
const verdictOf = (verdicts, entry, number) => (verdicts[pairOf(entry, number)] || [null])[0];
function judge(entry, number, verdict) {
  const verdicts = load(), pair = pairOf(entry, number);  // read anew: another page may have judged meanwhile
  if (verdict) verdicts[pair] = [verdict, entry.row.neighbours[number][1]]; else delete verdicts[pair];
  keep(verdicts);
  paint(entry, verdicts);
  count(verdicts);
}
function threshold() { return +by("threshold").value; }
function isShown(entry, number) { return entry.row.neighbours[number][1] >= threshold(); }
function paint(entry, verdicts) {
  if (!entry.tiles) return;
  entry.tiles.forEach((tile, number) => {
    const verdict = verdictOf(verdicts, entry, number);
    tile.hidden = !isShown(entry, number) && !verdict;
    tile.className = "tile" + (verdict ? " " + verdict : "");
    for (const button of tile.querySelectorAll(".answers button"))
      button.setAttribute("aria-pressed", String(button.classList.contains(verdict)));
  });
}
function count(verdicts) {
  const here = {duplicate: 0, not: 0, unsure: 0};
  for (const [verdict] of Object.values(verdicts)) if (verdict in here) here[verdict]++;
  by("counts").replaceChildren(...Object.entries(here).flatMap(([verdict, number]) =>
    [element("b", verdict, String(number)), " " + verdict + "\u2002"]));
}
function refresh() {
  const verdicts = load(), filter = by("filter").value;
  by("shown").textContent = threshold().toFixed(3);
  let any = false;
  for (const entry of rows) {
    const all = entry.row.neighbours.map((_, number) => verdictOf(verdicts, entry, number));
    const visible = all.map((verdict, number) => isShown(entry, number) || verdict);
    const wanted = filter === "all" ? visible.some(Boolean)
      : filter === "open" ? all.some((verdict, number) => !verdict && isShown(entry, number))
      : all.includes(filter);
    entry.section.hidden = !wanted;
    any ||= wanted;
    paint(entry, verdicts);
  }
  by("none").hidden = any;
  count(verdicts);
}

// --- moving and keys ---

let current = null;
function visibleTiles(entry) {
  build(entry);
  return entry.tiles.map((_, number) => number).filter(number => !entry.tiles[number].hidden);
}
function go(entry, number) {
  build(entry);
  entry.tiles[number].focus({preventScroll: true});
  entry.tiles[number].scrollIntoView({block: "nearest", inline: "nearest"});
  entry.section.scrollIntoView({block: "nearest"});
}
function moveRow(step) {
  const shown = rows.filter(entry => !entry.section.hidden);
  const at = current ? shown.indexOf(current[0]) + step : 0;
  for (let next = at; next >= 0 && next < shown.length; next += step || 1) {
    const tiles = visibleTiles(shown[next]);
    if (tiles.length) return go(shown[next], tiles[0]);
  }
}
function moveTile(step) {
  if (!current) return moveRow(0);
  const next = visibleTiles(current[0]).filter(number => step > 0 ? number > current[1] : number < current[1]);
  if (next.length) go(current[0], step > 0 ? next[0] : next[next.length - 1]);
}
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const verdict = {d: "duplicate", n: "not", u: "unsure"}[key];
  if (key === "ArrowDown" || key === "j") moveRow(1);
  else if (key === "ArrowUp" || key === "k") moveRow(-1);
  else if (key === "ArrowRight" || key === "l") moveTile(1);
  else if (key === "ArrowLeft" || key === "h") moveTile(-1);
  else if (key === "s") save();
  else if (current && verdict === "not" && event.shiftKey) {
    const [entry] = current;
    for (const number of visibleTiles(entry))
      if (!verdictOf(load(), entry, number)) judge(entry, number, "not");
    moveRow(1);
  } else if (current && verdict) { judge(...current, verdict); moveTile(1); }
  else if (current && (key === "x" || key === "Backspace")) judge(...current, null);
  else return;
  event.preventDefault();
});

// --- files ---

function save() {
  const pairs = Object.entries(load()).map(([pair, [verdict, similarity]]) =>
    [...pair.split(apart), similarity, verdict, "by hand"]);
  const text = JSON.stringify({format: data.format, version: data.version, train: data.train,
    evaluation: data.evaluation, method: data.method, pairs}, null, 1) + "\n";
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "judgements-" + data.evaluation.name + ".json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
by("save").addEventListener("click", save);
by("load").addEventListener("change", async event => {
  try {
    const found = JSON.parse(await event.target.files[0].text());
    if (found.format !== data.format || found.train.sha256 !== data.train.sha256 ||
        found.evaluation.sha256 !== data.evaluation.sha256 || found.method !== data.method)
      throw new Error("it was judged in another report");
    const verdicts = load();
    for (const [evaluation, training, similarity, verdict] of found.pairs)
      if (data.verdicts.includes(verdict)) verdicts[evaluation + apart + training] = [verdict, Number(similarity)];
    keep(verdicts);
    by("warning").textContent = "";
    refresh();
  } catch (error) { by("warning").textContent = "These judgements cannot be loaded: " + error.message; }
  event.target.value = "";
});
addEventListener("storage", event => { if (event.key === place) refresh(); });

// --- the head ---

by("name").textContent = data.evaluation.name + " in " + data.train.name;
by("method").textContent = data.method;
const file = number => "page-" + String(number).padStart(4, "0") + ".html";
for (const [number, text] of [[data.page - 1, "\u2039 previous"], [0, "page " + data.page + " of " + data.pages],
                              [data.page + 1, "next \u203a"]]) {
  if (text.startsWith("page")) by("pages").append(" " + text + " ");
  else if (number >= 1 && number <= data.pages) {
    const link = element("a", "", text);
    link.href = file(number);
    by("pages").append(link);
  }
}
const none = element("div", "none", "No image to show: lower the similarity, or show all.");
none.id = "none";
by("rows").append(none);
by("threshold").value = data.suggested;
by("threshold").addEventListener("input", refresh);
by("filter").addEventListener("change", refresh);
refresh();
"""
