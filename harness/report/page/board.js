// The leaderboard: filters, sorting, pages. The rows come from the JSON in the page, and only one page of them is in the
// document at a time. The state lives in the address after "#?", so that a view can be linked to. All text from
// records goes in as text nodes.
addEventListener("DOMContentLoaded", () => {
  const store = document.getElementById("data");
  if (!store) return;
  const { fields, tables, rows: packed } = JSON.parse(store.textContent);
  const PAGE = 100;
  const form = document.getElementById("filters");
  const shown = document.getElementById("shown");
  const nothing = document.getElementById("nothing");
  const table = document.getElementById("board");
  const pages = document.getElementById("pages");
  const heads = [...table.tHead.rows[0].cells];
  const columns = heads.map((th) => ({ key: th.dataset.key, kind: th.dataset.kind, th }));

  // ------------------------------------------------------------------------------------------------------- rows
  const number = (v) => (v === "inf" ? Infinity : typeof v === "string" ? null : v);
  const rows = packed.map((values) => {
    const row = {};
    for (let i = 0; i < fields.length; i++) row[fields[i]] = values[i];
    const t = tables[row.table];
    row.suite = t.suite;
    row.task = t.task;
    row.target = t.target;
    row.epsilon = t.epsilon;
    return row;
  });
  const scales = tables.map(() => [0, 0]); // of the small plots of differences, by table
  for (const row of rows) {
    if (row.role === "reference" || !row.difference) continue;
    const scale = scales[row.table];
    for (const x of row.difference.slice(0, 3)) if (x !== null) { scale[0] = Math.min(scale[0], x); scale[1] = Math.max(scale[1], x); }
  }

  const by = {
    accuracy: (r) => r.accuracy && r.accuracy[0],
    difference: (r) => (r.role === "baseline" ? 0 : r.difference && r.difference[0]),
    audited: (r) => r.audited && r.audited[0],
    checked: (r) => r.checked[0],
  };
  function value(row, column) {
    if (column.kind === "text") return String(row[column.key] ?? "");
    return by[column.key] ? by[column.key](row) : number(row[column.key]);
  }

  // ------------------------------------------------------------------------------------------------------ state
  const state = new Map();
  function read() {
    state.clear();
    if (location.hash.startsWith("#?")) for (const [k, v] of new URLSearchParams(location.hash.slice(2))) state.set(k, v);
  }
  function write() {
    const query = new URLSearchParams([...state].filter(([, v]) => v !== "")).toString();
    history.replaceState(null, "", query ? "#?" + query : location.pathname.split("/").pop() || "#");
  }

  const filters = ["suite", "task", "epsilon", "method", "family", "device", "public", "status"];
  const collator = new Intl.Collator("en", { numeric: true });
  for (const name of filters) {
    const select = form.elements[name];
    if (!select) continue;
    const values = new Set();
    for (const row of rows) for (const v of name === "status" ? row.status : [row[name]]) if (v) values.add(v);
    const sorted = [...values].sort(collator.compare);
    if (name === "epsilon") sorted.sort((a, b) => (a === "∞") - (b === "∞") || Number(a) - Number(b));
    for (const v of sorted) select.append(new Option(name === "status" ? v.replaceAll("_", " ") : v, v));
    select.closest("label").hidden = sorted.length < 2;
  }

  function fitting() {
    const wanted = filters.filter((f) => state.get(f)).map((f) => [f, state.get(f)]);
    const words = (state.get("text") || "").toLowerCase().split(/\s+/).filter(Boolean);
    return rows.filter((row) => {
      for (const [f, v] of wanted) if (f === "status" ? !row.status.includes(v) : row[f] !== v) return false;
      if (!words.length) return true;
      row.text ??= [row.title, row.method, row.task, row.suite, row.family, row.device, row.more].join(" ").toLowerCase();
      return words.every((w) => row.text.includes(w));
    });
  }

  function ordered(found) {
    const [key, direction] = (state.get("sort") || "").split(".");
    const column = columns.find((c) => c.key === key);
    const apart = state.get("flat") !== "1";
    if (!apart) { // one setting's references stand in several tables
      const seen = new Set();
      found = found.filter((r) => r.role !== "reference" || !(seen.has(r.suite + r.href) || !seen.add(r.suite + r.href)));
    }
    if (!column) return found;
    const sign = direction === "desc" ? -1 : 1;
    const keyed = found.map((row, i) => [row, value(row, column), i]);
    keyed.sort(([p, a, i], [q, b, j]) => {
      if (apart && p.table !== q.table) return p.table - q.table;
      if (apart && (p.role === "reference") !== (q.role === "reference")) return (p.role === "reference") - (q.role === "reference");
      if (a === null || b === null) return (a === null) - (b === null) || i - j; // unknown last, either way
      const busy = p.busy.includes(column.key) - q.busy.includes(column.key);
      if (busy) return busy; // a time of a busy machine is not compared with others
      const order = column.kind === "text" ? collator.compare(a, b) : a < b ? -1 : a > b ? 1 : 0;
      return sign * order || i - j;
    });
    return keyed.map(([row]) => row);
  }

  // ------------------------------------------------------------------------------------------------------ cells
  const make = (tag, text, name) => {
    const e = document.createElement(tag);
    if (text !== undefined) e.textContent = text;
    if (name) e.className = name;
    return e;
  };
  const epsilon = (x) => (x === null ? "–" : x === "inf" ? "∞" : typeof x === "string" ? x : String(Number(x.toPrecision(4))));
  const count = (x) => (x === null ? "–" : x === "inf" ? "never" : Math.abs(x) >= 100 ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(3))));
  const mark = (text, kind, title) => { const m = make("span", text, "mark " + kind); if (title) m.title = title; return m; };

  function strip(row) {
    const [low, high] = scales[row.table];
    if (!(high > low)) return null;
    const pad = 0.06 * (high - low);
    const at = (x) => ((100 * (x - low + pad)) / (high - low + 2 * pad)).toFixed(2);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("class", "strip");
    svg.setAttribute("viewBox", "0 0 100 10");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    const line = (x1, x2, y1, y2, name) => {
      const l = document.createElementNS("http://www.w3.org/2000/svg", "line");
      for (const [k, v] of Object.entries({ x1, x2, y1, y2 })) l.setAttribute(k, v);
      if (name) l.setAttribute("class", name);
      svg.append(l);
    };
    line(at(0), at(0), 0, 10, "zero");
    if (row.difference && row.difference[1] !== null && row.role !== "reference") {
      const [mean, a, b] = row.difference;
      line(at(a), at(b), 5, 5);
      line(at(mean), at(mean), 2, 8, "dot");
    }
    return svg;
  }

  const write_cell = {
    text: (td, row, key) => td.append(key === "target" ? epsilon(row.target) : String(row[key] || "–")),
    epsilon: (td, row, key) => td.append(epsilon(row[key])),
    count: (td, row, key) => td.append(count(row[key])),
    ratio: (td, row, key) => td.append(row[key] === null ? "–" : row[key].toFixed(2) + "×"),
    accuracy: (td, row) => {
      if (!row.accuracy) { td.append("–"); return; }
      const [, , , n, mean, half] = row.accuracy;
      td.append(mean, " ", make("small", `${half} n = ${n}`));
    },
    difference: (td, row) => {
      if (row.role === "baseline") { td.append("baseline "); const s = strip(row); if (s) td.append(s); return; }
      if (!row.difference) { td.append("–"); return; }
      const [, , , , mean, bounds] = row.difference;
      td.append(mean, " ", make("small", bounds || "one common seed"), " ");
      const s = strip(row);
      if (s) td.append(s);
    },
    claimed: (td, row) => {
      if (row.claimed === null && row.claim.includes("failed")) td.append(mark("off", "warn", row.claim));
      else td.append(epsilon(row.claimed));
      if (row.claim) td.title = row.claim;
    },
    audited: (td, row) => {
      if (!row.audited) { td.append("–"); return; }
      const [lower, confidence, instrument, task, above] = row.audited;
      td.append(epsilon(lower), " ");
      if (confidence !== null) td.append(make("small", `${Number((100 * confidence).toPrecision(4))} %`), " ");
      if (above) td.append(mark("above the claim", "bad"));
      td.title = [instrument, task && task !== row.task ? "on " + task : ""].filter(Boolean).join(", ");
    },
    checked: (td, row) => {
      const [text, kind, words] = row.checked;
      td.append(mark(text, kind));
      td.title = words;
    },
  };

  const BUSY = "timed while other work ran on the machine: not to be compared";
  function cell(td, row, c) {
    write_cell[c.kind](td, row, c.key);
    if (row[c.key] === null || !row.busy.includes(c.key)) return;
    td.append(make("sup", "†"));
    td.title = BUSY;
  }

  function line(row) {
    const tr = make("tr");
    if (row.role === "reference") tr.className = "reference";
    if (!row.accuracy) tr.classList.add("failed");
    const best = row.rank === 1;
    const rank = make("td", row.role === "reference" ? "ref" : row.rank === null ? "–" : row.rank + (row.tied ? "=" : ""), "rank" + (best ? " best" : ""));
    if (row.why) rank.title = "unranked: " + row.why;
    tr.append(rank);
    const title = make("th", undefined, "method");
    title.scope = "row";
    const link = make("a");
    link.append(make("bdi", row.title));
    if (row.href) link.href = row.href;
    title.append(link);
    if (row.merged) title.append(" ", mark("merged", "warn", `${row.merged} runs were made elsewhere: their accuracy and times are their sender's word`));
    if (row.stale) title.append(" ", mark("stale", "warn", `${row.stale} runs were made by other code than today's`));
    if (row.public && row.public !== "none") title.append(" ", mark("public data", ""));
    if (tables[row.table].search) title.append(" ", mark("validation", "warn"));
    for (const [status, reason, n] of row.failures) {
      const p = make("p", undefined, "reason");
      p.append(mark(`${n} ${status.replaceAll("_", " ")}`, "bad"), " ", reason);
      title.append(p);
    }
    tr.append(title);
    for (const c of columns.slice(2)) {
      const td = make("td", undefined, c.th.className);
      if (row.href && c.kind !== "text") {
        const a = make("a", undefined, "quiet");
        a.href = row.href;
        a.tabIndex = -1; // the method's link is the one to reach by keyboard
        cell(a, row, c);
        if (a.title) { td.title = a.title; a.removeAttribute("title"); }
        td.append(a);
      } else cell(td, row, c);
      tr.append(td);
    }
    return tr;
  }

  function group(t, id) {
    const body = make("tbody");
    const tr = make("tr", undefined, "group");
    const th = make("th");
    th.scope = "rowgroup";
    th.colSpan = heads.length;
    const inner = make("div");
    const name = make("strong", (form.elements.suite ? t.suite + ": " : "") + t.heading);
    name.id = id;
    inner.append(name);
    if (t.search) inner.append(" ", mark("validation split: to choose settings by, no result", "warn"));
    inner.append(make("span", t.statement, "statement"));
    if (t.notes.length) {
      const details = make("details");
      details.append(make("summary", `${t.notes.length} note${t.notes.length > 1 ? "s" : ""}`));
      const list = make("ul");
      for (const n of t.notes) list.append(make("li", n));
      details.append(list);
      inner.append(details);
    }
    th.append(inner);
    tr.append(th);
    body.append(tr);
    return body;
  }

  // ----------------------------------------------------------------------------------------------------- render
  let current = [];
  function render() {
    const apart = state.get("flat") !== "1";
    const last = Math.max(1, Math.ceil(current.length / PAGE));
    const page = Math.min(Math.max(1, Number(state.get("page")) || 1), last);
    const slice = current.slice((page - 1) * PAGE, page * PAGE);
    for (const body of [...table.tBodies]) body.remove();
    let [body, at] = [null, -1];
    for (const row of slice) {
      if (!body || (apart && row.table !== at)) {
        body = apart ? group(tables[row.table], tables[row.table].name) : make("tbody");
        table.append(body);
        at = row.table;
      }
      body.append(line(row));
    }
    table.classList.toggle("all", state.get("more") === "1");
    table.classList.toggle("flat", !apart);
    nothing.hidden = current.length > 0;
    shown.textContent = current.length === rows.length ? `${rows.length} rows` : `${current.length} of ${rows.length} rows`;
    pages.hidden = last < 2;
    pages.querySelector("output").textContent = `page ${page} of ${last}`;
    const [first, before, after, end] = pages.querySelectorAll("button");
    first.disabled = before.disabled = page === 1;
    after.disabled = end.disabled = page === last;
    first.dataset.to = 1; before.dataset.to = page - 1; after.dataset.to = page + 1; end.dataset.to = last;
    const [key, direction] = (state.get("sort") || "").split(".");
    for (const c of columns) {
      if (c.key === key) c.th.setAttribute("aria-sort", direction === "desc" ? "descending" : "ascending");
      else c.th.removeAttribute("aria-sort");
    }
  }
  function update() { current = ordered(fitting()); render(); }

  for (const c of columns) {
    c.th.querySelector("button").addEventListener("click", () => {
      const falling = c.kind !== "text" && c.key !== "rank"; // the largest first, where it is a number
      const steps = falling ? [c.key + ".desc", c.key, ""] : [c.key, c.key + ".desc", ""];
      state.set("sort", steps[(steps.indexOf(state.get("sort") || "") + 1) % 3]);
      state.delete("page");
      update();
      write();
    });
  }
  pages.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    state.set("page", button.dataset.to === "1" ? "" : button.dataset.to);
    render();
    write();
    table.closest("section").scrollIntoView();
  });
  table.addEventListener("click", (event) => {
    const link = event.target.closest("tr")?.querySelector("th.method a[href]");
    if (link && !event.target.closest("a, summary, details, button") && getSelection().isCollapsed) link.click();
  });

  // ------------------------------------------------------------------------------------------------- everything
  function show() {
    for (const field of form.elements) {
      if (!field.name) continue;
      if (field.type === "checkbox") field.checked = state.get(field.name) === "1";
      else field.value = state.get(field.name) || "";
    }
    update();
  }
  let wait = 0;
  form.addEventListener("input", (event) => {
    const field = event.target;
    state.set(field.name, field.type === "checkbox" ? (field.checked ? "1" : "") : field.value);
    state.delete("page");
    clearTimeout(wait);
    wait = setTimeout(() => { update(); write(); }, field.type === "search" ? 120 : 0);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => { event.preventDefault(); state.clear(); write(); show(); });
  addEventListener("hashchange", () => { if (location.hash.startsWith("#?") || !location.hash) { read(); show(); } });
  addEventListener("popstate", () => { if (location.hash.startsWith("#?") || !location.hash) { read(); show(); } });
  form.hidden = false;
  read();
  show();
});
