// Fetches this page anew from where it came, and puts in the sections that have changed. What the reader has done
// stays: order of tables, open details, where boxes are scrolled to, and the focus.
const pauseMilliseconds = 5000;
const freshness = document.getElementById("freshness");
const sectionTexts = new Map();
// The name of the content that was taken in: the server answers 304 while it is the same.
let contentName = "";

function stateOf(section) {
  return {
    open: [...section.querySelectorAll("details[open]")].map((each) => each.dataset.keep),
    scrolled: [...section.querySelectorAll(".scroll")].map((each) => [each.dataset.keep, each.scrollLeft, each.scrollTop]),
    sorted: [...section.querySelectorAll("th[aria-sort]")].map((each) => [
      each.closest("figure").id, each.textContent, each.getAttribute("aria-sort"),
    ]),
    focus: focusIn(section),
  };
}

function focusIn(section) {
  const focused = document.activeElement;
  if (!section.contains(focused)) return null;
  const figure = focused.closest("figure[id]");
  if (focused.tagName === "BUTTON") return [figure.id, focused.textContent];
  if (focused.tagName === "SUMMARY") return [focused.parentElement.id, "summary"];
  return figure ? [figure.id, "scroll"] : null;
}

function restore(section, state) {
  const byKeep = (keep) => section.querySelector(`[data-keep="${keep}"]`);
  const headings = (id) => [...section.querySelectorAll(`figure[id="${id}"] thead th`)];
  for (const keep of state.open) byKeep(keep)?.setAttribute("open", "");
  for (const [id, text, direction] of state.sorted) {
    const column = headings(id).findIndex((each) => each.textContent === text);
    if (column >= 0) sortTable(headings(id)[column].closest("table"), column, direction);
  }
  for (const [keep, left, top] of state.scrolled) byKeep(keep)?.scrollTo({ left, top, behavior: "instant" });
  if (state.focus) {
    const [id, what] = state.focus;
    const target = what === "scroll" ? section.querySelector(`figure[id="${id}"] .scroll`)
      : what === "summary" ? section.querySelector(`details[id="${id}"] > summary`)
      : headings(id).find((each) => each.textContent === what)?.firstElementChild;
    target?.focus({ preventScroll: true });
  }
}

function take(text) {
  const found = new DOMParser().parseFromString(text, "text/html");
  const main = document.getElementById("content");
  const wanted = [...found.querySelectorAll("main > section")];
  const keptIds = new Set(wanted.map((each) => each.id));
  for (const old of [...main.children]) if (!keptIds.has(old.id)) old.remove();
  wanted.forEach((section, place) => {
    const old = document.getElementById(section.id);
    const html = section.outerHTML;
    let now = old;
    if (!old || sectionTexts.get(section.id) !== html) {
      const state = old && stateOf(old);
      now = document.importNode(section, true);
      if (old) old.replaceWith(now);
      for (const table of now.querySelectorAll("table")) makeSortable(table);
      if (!old) main.append(now);
      if (state) restore(now, state);
      sectionTexts.set(section.id, html);
    }
    if (main.children[place] !== now) main.insertBefore(now, main.children[place] ?? null);
  });
  const nav = found.querySelector("nav");
  const own = document.querySelector("nav");
  if (nav.innerHTML !== own.innerHTML) own.innerHTML = nav.innerHTML;
  document.title = found.title;
  document.querySelector("h1").textContent = found.querySelector("h1").textContent;
}

async function refresh() {
  try {
    const headers = contentName ? { "If-None-Match": contentName } : {};
    const answer = await fetch(location.pathname + location.search, { cache: "no-store", headers });
    if (!answer.ok && answer.status !== 304) throw new Error(answer.status);
    const selects = !document.getSelection().isCollapsed;
    if (answer.ok && !selects) {
      take(await answer.text());
      contentName = answer.headers.get("ETag") ?? "";
    }
    freshness.textContent = "";
  } catch {
    if (!freshness.textContent) freshness.textContent = `not reached since ${new Date().toLocaleTimeString()}`;
  }
}

async function keepFresh() {
  if (!document.hidden) await refresh();
  setTimeout(keepFresh, pauseMilliseconds);
}

setTimeout(keepFresh, pauseMilliseconds);
