// The interactive page. Everything shown stands in window.PLAY, written by fx.site from committed tables; nothing is computed
// here but which entry to show. Works from a file, without a server.
(function () {
  "use strict";
  const data = window.PLAY;
  const SVG = "http://www.w3.org/2000/svg";
  const COLOURS = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#8c3b83", "#8a7d00", "#1f77b4"];

  function svg(name, attributes, parent) {
    const found = document.createElementNS(SVG, name);
    for (const key in attributes) found.setAttribute(key, attributes[key]);
    if (parent) parent.appendChild(found);
    return found;
  }

  // one picture of a sheet, as a nested drawing
  function picture(sheet, row, column, options, parent) {
    const side = sheet.side;
    const box = svg("svg", Object.assign({ viewBox: `${column * side} ${row * side} ${side} ${side}` }, options), parent);
    svg("image", { href: sheet.file, width: sheet.columns * side, height: sheet.rows * side }, box);
    return box;
  }

  function mark(value) {
    return value.toFixed(2) + (value > data.strict ? " **" : value > data.loose ? " *" : "");
  }

  // the guidance scale

  const select = document.getElementById("scale-item");
  const scale = document.getElementById("scale-range");
  data.items.forEach((item, number) => select.add(new Option(item.title, number)));

  function figures(title, sheet, row, count, texts, alt) {
    const heading = document.createElement("p");
    heading.className = "title";
    heading.textContent = title;
    const line = document.createElement("div");
    line.className = "row";
    for (let column = 0; column < count; column++) {
      const figure = document.createElement("figure");
      picture(sheet, row, column, { role: "img", "aria-label": `${alt} ${column + 1}` }, figure);
      const caption = document.createElement("figcaption");
      caption.textContent = texts ? texts[column] : "";
      figure.appendChild(caption);
      line.appendChild(figure);
    }
    return [heading, line];
  }

  function showScale() {
    const item = data.items[select.value];
    const at = item.scales[scale.value];
    document.getElementById("scale-value").textContent = at.w;
    scale.setAttribute("aria-valuetext", `w′ ${at.w}`);
    document.getElementById("scale-said").textContent =
      `AS ${at.AS.toFixed(3)}, above the strict threshold ${Math.round(100 * at.strict)}%, ` +
      `above the loose one ${Math.round(100 * at.loose)}% of ${item.n} training images.`;
    const rows = [
      ...figures("training images", item.sheet, 0, item.shown, null, "training image"),
      ...figures(`extracted, w′ = ${at.w} (similarity; * above the loose, ** above the strict threshold)`,
        item.sheet, Number(scale.value) + 1, item.shown, at.matches.map(mark), "most similar extracted image"),
    ];
    document.getElementById("scale-pictures").replaceChildren(...rows);
  }

  function showItem() {
    const item = data.items[select.value];
    scale.max = item.scales.length - 1;
    scale.value = item.scales.findIndex((entry) => entry.w === item.chosen);
    showScale();
  }

  select.addEventListener("change", showItem);
  scale.addEventListener("input", showScale);
  // play.html#w=8&phi=0.5&item=1 opens at these values
  const asked = new URLSearchParams(location.hash.slice(1));
  select.value = data.items[asked.get("item")] ? asked.get("item") : 0;
  showItem();
  const wanted = data.items[select.value].scales.findIndex((entry) => entry.w === Number(asked.get("w")));
  if (wanted >= 0) { scale.value = wanted; showScale(); }

  // the threshold

  const cliques = data.cliques;
  const phi = document.getElementById("phi-range");
  const WIDTH = 640, HEIGHT = 420, TILE = 34;
  const graph = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-labelledby": "phi-said" });
  document.getElementById("phi-graph").appendChild(graph);
  const at = cliques.places.map(([x, y]) => [20 + x * (WIDTH - 40), 24 + y * (HEIGHT - 48)]);
  const lines = svg("g", {}, graph);
  const frames = [], names = [];
  at.forEach(([x, y], number) => {
    const sheet = cliques.sheet;
    picture(sheet, Math.floor(number / sheet.columns), number % sheet.columns,
      { x: x - TILE / 2, y: y - TILE / 2, width: TILE, height: TILE }, graph);
    frames.push(svg("rect", { x: x - TILE / 2, y: y - TILE / 2, width: TILE, height: TILE, fill: "none" }, graph));
    names.push(svg("text", { x: x + TILE / 2 + 1, y: y - TILE / 2 + 8 }, graph));
  });
  phi.max = cliques.phi.length - 1;
  phi.value = cliques.phi.findIndex((value) => value >= cliques.end);

  function showPhi() {
    const value = cliques.phi[phi.value], labels = cliques.labels[phi.value];
    const joined = cliques.pairs.filter(([, , similarity]) => similarity >= value);
    lines.replaceChildren(...joined.map(([i, j]) =>
      svg("line", { x1: at[i][0], y1: at[i][1], x2: at[j][0], y2: at[j][1] })));
    const sizes = {};
    labels.forEach((label, number) => {
      sizes[label] = (sizes[label] || 0) + 1;
      const colour = label ? COLOURS[(label - 1) % COLOURS.length] : "#999";
      frames[number].setAttribute("stroke", colour);
      frames[number].setAttribute("stroke-width", label ? 2.5 : 0.6);
      names[number].textContent = label || "";
    });
    const alone = sizes[0] || 0, groups = Object.keys(sizes).filter((label) => label !== "0").length;
    document.getElementById("phi-value").textContent = value.toFixed(2);
    phi.setAttribute("aria-valuetext", `φ ${value.toFixed(2)}`);
    const members = {};
    labels.forEach((label, number) => (members[label] = members[label] || []).push(number + 1));
    document.getElementById("phi-list").replaceChildren(...Object.keys(members).sort((a, b) => (a === "0") - (b === "0") || a - b)
      .map((label) => {
        const item = document.createElement("li");
        item.textContent = (label === "0" ? "alone" : `clique ${label}`) + `: images ${members[label].join(", ")}`;
        return item;
      }));
    document.getElementById("phi-said").textContent =
      `${joined.length} of ${cliques.pairs.length} pairs are joined; ${groups + alone} cliques: ${groups} of two images or ` +
      `more, the largest of ${sizes[1] || 1}, and ${alone} single images.` +
      (Math.abs(value - cliques.end) < 0.011 ? ` About here the paper's rule ends (φ = ${cliques.end.toFixed(2)}, ${cliques.n} training images).` : "");
  }

  phi.addEventListener("input", showPhi);
  const height = cliques.phi.findIndex((value) => asked.has("phi") && value >= Number(asked.get("phi")) - 1e-9);
  if (height >= 0) phi.value = height;
  showPhi();
})();
