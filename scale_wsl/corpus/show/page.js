"use strict";
// What moves on the page. Everything that comes from the data is set as text, never as markup.
(() => {
  const root = document.documentElement;
  const by = (id) => document.getElementById(id);
  addEventListener("error", (event) => root.setAttribute("data-error", event.message));
  addEventListener("securitypolicyviolation", (event) => root.setAttribute("data-error", event.violatedDirective));

  const data = JSON.parse(by("data").textContent);
  const roles = data.sides.map((side) => side.role);
  const names = { train: "training", val: "validation", test: "test" };
  const nameOf = (label) => data.tags[label][0];
  const countOf = (label, role) => data.tags[label][1 + roles.indexOf(role)];
  const figure = (value) => value.toLocaleString("en-US");
  const images = (value) => (value === 1 ? "1 image" : `${figure(value)} images`);
  const labelOf = new Map(Object.keys(data.tags).map((label) => [nameOf(label), Number(label)]));

  const make = (tag, style, ...children) => {
    const made = document.createElement(tag);
    if (style) made.className = style;
    made.append(...children);
    return made;
  };
  const isolated = (text) => make("bdi", "", text); // a text's direction is its own

  // --- pictures ---
  const STEP = 28;
  const state = { labels: [], text: "", side: "all", most: STEP };
  const gallery = by("gallery");

  const shows = (picture) => {
    if (state.side !== "all" && picture.side !== state.side) return false;
    if (state.labels.length) return state.labels.every((label) => picture.labels.includes(label));
    if (state.text) return picture.labels.some((label) => nameOf(label).includes(state.text));
    return picture.sample;
  };

  const chip = (label) => {
    const made = make("button", "tag", isolated(nameOf(label)));
    made.type = "button";
    made.dataset.tag = label;
    if (state.labels.includes(label)) made.classList.add("chosen");
    return made;
  };

  const drawing = (picture) => {
    if (!picture.source) return make("span", "refused", "cannot be shown: ", isolated(picture.refused));
    const image = make("img", "");
    image.src = picture.source;
    image.alt = `${picture.key}: ${picture.labels.map(nameOf).join(", ")}`;
    image.decoding = "async";
    return image;
  };

  const tile = (picture) => {
    const open = make("button", "", drawing(picture));
    open.type = "button";
    open.addEventListener("click", () => enlarge(picture));
    if (roles.length > 1) {
      const dot = make("span", `side ${["first", "second", "third"][roles.indexOf(picture.side)]}`);
      dot.title = names[picture.side];
      open.append(dot);
    }
    const chosen = picture.labels.filter((label) => state.labels.includes(label));
    const first = [...new Set([...chosen, ...picture.labels])].slice(0, 6);
    const tags = make("div", "tags", ...first.map(chip));
    const more = picture.labels.length - first.length + picture.more;
    if (more) tags.append(make("small", "", `+${figure(more)}`));
    return make("div", "tile", open, tags);
  };

  const enlarge = (picture) => {
    const lines = [make("p", "quiet", isolated(picture.key), ` · ${names[picture.side]}`), make("p", "", ...picture.labels.map(chip))];
    if (picture.more) lines.push(make("p", "quiet", `and ${figure(picture.more)} more`));
    by("large").replaceChildren(drawing(picture), ...lines);
    by("picture").showModal();
  };

  const pairCount = (labels) => {
    const at = labels.map((label) => data.heat.labels.indexOf(label));
    if (at.every((place) => place >= 0)) return data.heat.counts[at[0]][at[1]];
    const found = [...document.querySelectorAll("[data-tag]")].find((button) => button.dataset.tag === labels.join(" "));
    return found ? Number(found.textContent.replaceAll(",", "")) : null;
  };

  const told = (found) => {
    const here = found.length === 1 ? "1 picture" : `${figure(found.length)} pictures`;
    if (state.labels.length === 1) {
      const counts = roles.map((role) => `${figure(countOf(state.labels[0], role))} ${names[role]}`);
      return `#${nameOf(state.labels[0])}: ${here} on this page, of ${counts.join(" and ")} images.`;
    }
    if (state.labels.length === 2) {
      const both = pairCount(state.labels);
      const of = both === null ? "" : `, of ${images(both)} in the ${names[roles[0]]} set`;
      return `#${state.labels.map(nameOf).join(" and #")}: ${here} on this page${of}.`;
    }
    return state.text ? `${here} with a hashtag that contains “${state.text}”.` : `${here} of the sample.`;
  };

  const render = () => {
    const found = data.pictures.filter(shows);
    gallery.replaceChildren(...found.slice(0, state.most).map(tile));
    by("told").textContent = told(found);
    by("more").classList.toggle("off", found.length <= state.most);
    by("clear").classList.toggle("off", !state.labels.length && !state.text);
  };

  const choose = (labels, text = "") => {
    Object.assign(state, { labels, text, most: STEP });
    const address = labels.length ? `#hashtag=${labels.map((label) => encodeURIComponent(nameOf(label))).join("+")}` : "#images";
    history.replaceState(null, "", address);
    render();
  };

  const goTo = (labels) => {
    if (by("picture").open) by("picture").close();
    by("filter").value = labels.map(nameOf).join(" + ");
    choose(labels);
    by("images").scrollIntoView();
  };

  if (gallery) {
    const known = new Set(data.pictures.flatMap((picture) => picture.labels));
    const options = [...known].sort((a, b) => a - b).map((label) => {
      const option = make("option", "");
      option.value = nameOf(label);
      return option;
    });
    by("hashtags").append(...options);
    by("filter").addEventListener("input", () => {
      const typed = by("filter").value.trim().replace(/^#+/, "").toLowerCase();
      if (labelOf.has(typed)) choose([labelOf.get(typed)]);
      else choose([], typed);
    });
    by("clear").addEventListener("click", () => {
      by("filter").value = "";
      choose([]);
      by("filter").focus();
    });
    by("more").addEventListener("click", () => {
      state.most += STEP;
      render();
    });
    for (const radio of document.getElementsByName("side")) {
      radio.addEventListener("change", () => {
        Object.assign(state, { side: radio.value, most: STEP });
        render();
      });
    }
    by("close").addEventListener("click", () => by("picture").close());
    by("picture").addEventListener("click", (event) => {
      if (event.target === by("picture")) by("picture").close(); // beside it
    });
    document.addEventListener("click", (event) => {
      const button = event.target.closest("[data-tag]");
      if (button) goTo(button.dataset.tag.split(" ").map(Number));
    });
    const asked = location.hash.match(/^#hashtag=(.+)$/);
    let wanted = [];
    try {
      wanted = asked ? asked[1].split("+").map((name) => labelOf.get(decodeURIComponent(name))) : [];
    } catch {
      wanted = []; // an address that nobody made here
    }
    if (wanted.length && wanted.length <= 2 && wanted.every((label) => label !== undefined)) goTo(wanted);
    else render();
  } else {
    for (const button of document.querySelectorAll("[data-tag]")) button.disabled = true;
  }

  // --- what stands beside the pointer ---
  const tip = by("tip");
  const hide = () => tip.classList.add("off");
  const say = (text, x, y) => {
    tip.textContent = text;
    tip.classList.remove("off");
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${y - box.height - 14 > 8 ? y - box.height - 14 : y + 20}px`;
  };
  const onScreen = (svg, x, y) => new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
  const inDrawing = (svg, event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const focusable = (svg) => {
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    addEventListener("scroll", hide, { passive: true });
  };

  // --- the curve ---
  const curve = by("curve-chart");
  const marker = curve.querySelector(".marker");
  let at = [0, 0];
  const showPoint = (series, place) => {
    at = [series, place];
    const [x, y, rank, label] = data.curves[series][place];
    marker.setAttribute("cx", x);
    marker.setAttribute("cy", y);
    marker.classList.remove("off");
    const screen = onScreen(curve, x, y);
    const role = roles[series];
    say(`#${nameOf(label)} · rank ${figure(rank)} · ${images(countOf(label, role))} (${role})`, screen.x, screen.y);
  };
  const nearest = (point) => {
    let best = [0, 0, Infinity];
    data.curves.forEach((points, series) => {
      points.forEach(([x, y], place) => {
        const far = (x - point.x) ** 2 + (y - point.y) ** 2;
        if (far < best[2]) best = [series, place, far];
      });
    });
    return best;
  };
  const openPoint = () => gallery && goTo([data.curves[at[0]][at[1]][3]]);
  focusable(curve);
  curve.addEventListener("pointermove", (event) => showPoint(...nearest(inDrawing(curve, event))));
  curve.addEventListener("click", (event) => {
    showPoint(...nearest(inDrawing(curve, event)));
    openPoint();
  });
  curve.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const turn = { ArrowUp: 1, ArrowDown: 1 }[event.key];
    const series = (at[0] + (turn ?? 0)) % data.curves.length;
    if (move || turn) showPoint(series, Math.max(0, Math.min(at[1] + (move ?? 0), data.curves[series].length - 1)));
    else if (event.key === "Enter") openPoint();
    else return;
    event.preventDefault();
  });

  // --- the heat map ---
  const heat = by("heat-chart");
  if (heat) {
    const { labels, counts, cell, room } = data.heat;
    const cursor = heat.querySelector(".cursor");
    let place = [0, 1];
    const bits = (row, column) => Math.log2((counts[row][column] * data.heat.images) / counts[row][row] / counts[column][column]);
    const showCell = (row, column) => {
      place = [row, column];
      for (const text of heat.querySelectorAll("text")) {
        const { row: ofRow, column: ofColumn } = text.dataset;
        text.classList.toggle("at", Number(ofRow) === row || Number(ofColumn) === column);
      }
      cursor.setAttribute("x", room + column * cell - 1);
      cursor.setAttribute("y", room + row * cell - 1);
      cursor.classList.remove("off");
      const screen = onScreen(heat, room + (column + 0.5) * cell, room + row * cell);
      const shared = counts[row][column];
      const more = row === column || !shared ? "" : ` · ${bits(row, column).toFixed(2)} bits`;
      const both = row === column ? `#${nameOf(labels[row])}` : `#${nameOf(labels[row])} and #${nameOf(labels[column])}`;
      say(`${both}: ${images(shared)}${more}`, screen.x, screen.y);
    };
    const cellAt = (event) => {
      const point = inDrawing(heat, event);
      const [row, column] = [point.y, point.x].map((value) => Math.floor((value - room) / cell));
      return row >= 0 && column >= 0 && row < labels.length && column < labels.length ? [row, column] : null;
    };
    const openCell = () => gallery && goTo([...new Set(place.map((number) => labels[number]))]);
    focusable(heat);
    heat.addEventListener("pointermove", (event) => {
      const found = cellAt(event);
      if (found) showCell(...found);
      else hide();
    });
    heat.addEventListener("click", (event) => {
      const found = cellAt(event);
      const { row, column } = event.target.dataset;
      if (found) {
        showCell(...found);
        openCell();
      } else if (gallery && (row ?? column) !== undefined) goTo([labels[Number(row ?? column)]]);
    });
    heat.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      const inside = (value) => Math.max(0, Math.min(value, labels.length - 1));
      if (move) showCell(inside(place[0] + move[0]), inside(place[1] + move[1]));
      else if (event.key === "Enter") openCell();
      else return;
      event.preventDefault();
    });
    for (const radio of document.getElementsByName("measure")) {
      radio.addEventListener("change", () => {
        by("together").className = radio.value;
      });
    }
  }

  // --- the labels ---
  const rows = [...by("labels-table").tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()]);
  let mostRows = 30;
  const find = () => {
    const typed = by("find").value.trim().replace(/^#+/, "").toLowerCase();
    const kind = document.querySelector("input[name=kind]:checked").value;
    let fit = 0;
    for (const [row, text] of rows) {
      const fits = text.includes(typed) && (kind === "all" || (row.dataset.kinds ?? "").includes(kind));
      fit += fits;
      row.classList.toggle("off", !fits || fit > mostRows);
    }
    by("found").textContent = `${figure(fit)} of ${figure(rows.length)} listed labels`;
    by("all").classList.toggle("off", fit <= mostRows);
  };
  by("find").addEventListener("input", find);
  by("all").addEventListener("click", () => {
    mostRows = Infinity;
    find();
  });
  for (const radio of document.getElementsByName("kind")) radio.addEventListener("change", find);
  find();

  root.setAttribute("data-ready", "yes");
})();
