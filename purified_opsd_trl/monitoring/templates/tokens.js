"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const names = { student: "student", teacher: "teacher (question + reference)", reference_only: "reference only",
    base: "base (question)" };
  const classes = data.classes;
  const byId = (id) => document.getElementById(id);
  const box = byId("tokens"), details = byId("details"), student = byId("student"), sample = byId("sample");
  let current = null, selected = -1, pinned = false;

  const element = (tag, text, attributes = {}) => {
    const node = document.createElement(tag);
    if (text !== null) node.textContent = text;
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const signed = (x) => (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(2);
  const visible = (piece) => piece.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/ /g, "\u2423") || "(empty)";
  const spoken = (piece) => piece.trim() || (piece.includes("\n") ? "line break" : "space");
  const bin = (x) => {
    const size = data.bins.filter((limit) => Math.abs(x) >= limit).length;
    return size === 0 ? "" : (x > 0 ? "p" : "n") + size;
  };
  const mode = () => document.querySelector("input[name=mode]:checked").value;

  function showSample() {
    current = data.students[student.selectedIndex].samples[sample.selectedIndex];
    byId("prompt").textContent = current.prompt;
    byId("reference").textContent = current.reference_prompt;
    box.replaceChildren(...current.pieces.map((piece, i) => {
      const node = element("span", piece, { id: "t" + i, role: "option", "aria-selected": "false" });
      node.dataset.i = i;
      return node;
    }));
    selected = -1;
    pinned = false;
    color();
    select(0, false);
  }

  function color() {
    const values = current[mode()];
    [...box.children].forEach((node, i) => {
      node.className = "tok " + bin(values[i]);
      node.setAttribute("aria-label", `${spoken(current.pieces[i])}, ${signed(values[i])}`);
    });
  }

  function select(i, scroll) {
    if (i < 0 || i >= box.children.length) return;
    if (selected >= 0) box.children[selected].setAttribute("aria-selected", "false");
    selected = i;
    const node = box.children[i];
    node.setAttribute("aria-selected", "true");
    box.setAttribute("aria-activedescendant", node.id);
    if (scroll) node.scrollIntoView({ block: "nearest" });
    showDetails(i);
  }

  function showDetails(i) {
    const piece = current.pieces[i];
    const title = element("h3", `Token ${i + 1} of ${current.pieces.length}: `);
    title.append(element("code", visible(piece)));
    const rows = [
      ["class", classes[current.classes[i]]],
      ["\u0394 ref (reference-induced)", signed(current.delta_ref[i])],
      ["\u0394 it (transferable)", signed(current.delta_it[i])],
      ["\u0394 total = ref + it", signed(current.delta_total[i])],
      ["cos(total, ref), weighted", current.mass_cos_total_ref[i].toFixed(3)],
      ["cos(total, ref), plain", current.cos_total_ref[i].toFixed(3)],
      ["|ref| / |total|, weighted", current.mass_norm_ratio_ref[i].toFixed(3)],
    ];
    const facts = element("table", null);
    facts.append(element("caption", "At this token (log-ratios in nats)"));
    const body = element("tbody", null);
    for (const [name, value] of rows) {
      const row = element("tr", null);
      row.append(element("th", name, { scope: "row" }), element("td", value, { class: "number" }));
      body.append(row);
    }
    facts.append(body);
    const grid = element("div", null, { class: "alternatives" });
    for (const [key, name] of Object.entries(names)) {
      const table = element("table", null);
      table.append(element("caption", name));
      const rowsOf = element("tbody", null);
      const list = current.alternatives[i][key];
      const own = Math.exp(current["logprob_" + key][i]);
      const entries = list.some(([text]) => text === piece) ? list : [...list, [piece, own]];
      for (const [text, p] of entries) {
        const row = element("tr", null);
        const head = element("th", null, { scope: "row" });
        head.append(element("code", (text === piece ? "\u25b6 " : "") + visible(text)));
        row.append(head, element("td", (100 * p).toPrecision(3) + " %", { class: "number" }));
        rowsOf.append(row);
      }
      table.append(rowsOf);
      grid.append(table);
    }
    details.replaceChildren(title, facts, grid);
  }

  function listSamples() {
    const before = Math.max(sample.selectedIndex, 0);
    const samples = data.students[student.selectedIndex].samples;
    sample.replaceChildren(...samples.map((s, i) => {
      const option = element("option", `${i + 1}: ${s.title}`);
      return option;
    }));
    sample.selectedIndex = Math.min(before, samples.length - 1);
    showSample();
  }

  box.addEventListener("mousemove", (event) => {
    const node = event.target.closest(".tok");
    if (node && !pinned && Number(node.dataset.i) !== selected) select(Number(node.dataset.i), false);
  });
  box.addEventListener("click", (event) => {
    const node = event.target.closest(".tok");
    if (!node) return;
    const i = Number(node.dataset.i);
    pinned = !(pinned && i === selected);
    select(i, false);
  });
  box.addEventListener("keydown", (event) => {
    const classOf = (i) => classes[current.classes[i]];
    const find = (step) => {
      for (let i = selected + step; i >= 0 && i < current.pieces.length; i += step) {
        if (classOf(i) === "epistemic") return i;
      }
      return selected;
    };
    const moves = {
      ArrowRight: () => selected + 1, ArrowLeft: () => selected - 1, ArrowDown: () => selected + 10,
      ArrowUp: () => selected - 10, Home: () => 0, End: () => current.pieces.length - 1,
      n: () => find(1), p: () => find(-1),
    };
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    pinned = true;
    select(Math.min(Math.max(moves[event.key](), 0), current.pieces.length - 1), true);
  });
  document.querySelectorAll("input[name=mode]").forEach((input) => input.addEventListener("change", color));
  student.addEventListener("change", listSamples);
  sample.addEventListener("change", showSample);
  student.replaceChildren(...data.students.map((s) => element("option", s.label)));
  listSamples();
})();
