"use strict";

// Everything that comes from the service is put in as text, never as HTML.

const SHOWN = 8;
const by = (id) => document.getElementById(id);
const asks = { mode: "user", user: "", words: "", taken: [] };
const titles = new Map();
let turn = 0; // of two answers under way only the later one is shown
let ranks = new Map();
let key = sessionStorage.getItem("key") || "";

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

async function call(method, path, body) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (key) headers["Authorization"] = `Bearer ${key}`;
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  const answer = await response.json();
  if (response.status === 401) {
    by("key-form").hidden = false;
    by("key").focus();
    throw new Error(answer.code === "no_key" ? "This service needs an API key." : answer.message);
  }
  if (!response.ok) throw new Error([answer.message, answer.remedy].filter(Boolean).join(" "));
  return answer;
}

function say(text, wrong) {
  by("status").textContent = text;
  by("status").classList.toggle("wrong", Boolean(wrong));
}

function asker() {
  if (asks.mode === "user") return { user: asks.user };
  const who = {};
  if (asks.taken.length) who.history = asks.taken.map((item) => item.id);
  if (asks.words) who.text = asks.words;
  return who;
}

async function recommend() {
  const mine = ++turn;
  if (asks.mode === "user" ? !asks.user : !asks.words && !asks.taken.length) {
    show([], "");
    showHistory([]);
    return;
  }
  try {
    const who = asker();
    const answer = await call("POST", "/v1/recommend", { ...who, k: SHOWN, filter_seen: true });
    if (mine !== turn) return;
    say(answer.items.length ? "" : "Nothing is left to recommend.");
    by("key-form").hidden = true;
    for (const item of answer.items) titles.set(item.id, item.text);
    const told = show(answer.items, answer.path);
    by("about").textContent = `Artefact ${answer.artefact}, catalogue ${answer.generation}`;
    if (asks.mode !== "user" || answer.path !== "towers") showHistory(taken());
    // one after the other: the first tells the history, and none hurries the service
    let first = true;
    for (const [item, place] of told) {
      const found = await call("POST", "/v1/explain", { ...who, item: item.id });
      if (mine !== turn) return;
      explain(place, found);
      if (first && asks.mode === "user" && answer.path === "towers") {
        const read = [...found.reasons].sort((a, b) => a.place - b.place);
        const fresh = new Set(asks.taken.map((item) => item.id));
        showHistory(read.map((reason) => ({ ...reason, fresh: fresh.has(reason.id) })));
      }
      first = false;
    }
  } catch (error) {
    if (mine === turn) say(error.message, true);
  }
}

function taken() {
  return asks.taken.map((item) => ({ ...item, fresh: true }));
}

function show(items, path) {
  const list = by("items");
  const before = new Map([...list.children].map((row) => [row.dataset.id, row.getBoundingClientRect().top]));
  const told = [];
  const best = Math.max(...items.map((item) => Math.abs(item.score)), 1e-9);
  const worst = Math.min(...items.map((item) => item.score), 0);
  list.replaceChildren(
    ...items.map((item, place) => {
      const row = make("li");
      row.dataset.id = item.id;
      const rank = make("div", "rank", String(place + 1));
      rank.append(movement(item.id, place));
      const bar = make("div", "score");
      bar.title = `score ${item.score.toFixed(3)}`;
      const filled = make("span");
      filled.style.width = `${Math.max(2, (100 * (item.score - worst)) / (best - worst))}%`;
      bar.append(filled);
      const why = make("details");
      why.append(make("summary", "", "…"));
      const body = make("div", "body");
      body.append(bar, why);
      const take = make("button", "take", "Take it");
      take.type = "button";
      take.setAttribute("aria-label", `Take ${item.text}`);
      take.addEventListener("click", () => pick(item, take));
      row.append(rank, make("div", "title", item.text), take, body);
      told.push([item, why]);
      return row;
    }),
  );
  by("path").textContent =
    { towers: "from the history", text: "from your words", popularity: "popular with everybody" }[path] || "";
  ranks = new Map(items.map((item, place) => [item.id, place]));
  animate(list, before);
  return told;
}

function movement(id, place) {
  if (!ranks.size) return make("span", "move");
  if (!ranks.has(id)) return make("span", "move up", "new");
  const by = ranks.get(id) - place;
  if (!by) return make("span", "move");
  return make("span", `move ${by > 0 ? "up" : "down"}`, `${by > 0 ? "▲" : "▼"} ${Math.abs(by)}`);
}

function animate(list, before) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches || !before.size) return;
  for (const row of list.children) {
    const from = before.get(row.dataset.id);
    const frames =
      from === undefined
        ? [{ opacity: 0 }, { opacity: 1 }]
        : [{ transform: `translateY(${from - row.getBoundingClientRect().top}px)` }, { transform: "none" }];
    row.animate(frames, { duration: 450, easing: "cubic-bezier(.2,.8,.2,1)" });
  }
}

function explain(place, found) {
  place.querySelector("summary").textContent = found.sentence;
  const effects = make("ul", "effects");
  for (const reason of found.reasons.slice(0, 6)) {
    const line = make("li");
    const sign = reason.effect >= 0 ? "+" : "−";
    line.append(
      make("span", "", reason.text),
      make("span", `by ${reason.effect >= 0 ? "up" : "down"}`, sign + Math.abs(reason.effect).toFixed(3)),
    );
    effects.append(line);
  }
  if (found.reasons.length) place.append(effects);
}

function showHistory(events) {
  by("history").replaceChildren(
    ...[...events].reverse().map((event) => make("li", event.fresh ? "new" : "", event.text)),
  );
  by("nothing").hidden = events.length > 0;
  by("again").hidden = asks.mode === "user" || !events.length;
}

async function pick(item, button) {
  button.disabled = true;
  try {
    if (asks.mode === "user") {
      const id = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16)).join("-");
      await call("POST", "/v1/events", { user: asks.user, events: [{ item: item.id, id }] });
    }
    asks.taken.push({ id: item.id, text: item.text });
    await recommend();
  } catch (error) {
    button.disabled = false;
    say(error.message, true);
  }
}

function begin(changes) {
  Object.assign(asks, { taken: [] }, changes);
  ranks = new Map();
  for (const chip of by("some-users").children) {
    chip.setAttribute("aria-pressed", String(chip.textContent === asks.user));
  }
  return recommend();
}

function mode(name) {
  for (const other of ["user", "words"]) {
    by(`tab-${other}`).setAttribute("aria-selected", String(other === name));
    by(`panel-${other}`).hidden = other !== name;
  }
  say("");
  return begin({ mode: name });
}

async function listUsers() {
  try {
    const { users } = await call("GET", "/v1/users?limit=200");
    by("users").replaceChildren(
      ...users.map((user) => {
        const option = make("option");
        option.value = user;
        return option;
      }),
    );
    by("some-users").replaceChildren(
      ...users.slice(0, 8).map((user) => {
        const chip = make("button", "", user);
        chip.type = "button";
        chip.addEventListener("click", () => {
          by("user").value = user;
          begin({ user });
        });
        return chip;
      }),
    );
    if (users.length && !asks.user) {
      by("user").value = users[0];
      await begin({ user: users[0] });
    } else if (!users.length) {
      await mode("words");
    }
  } catch (error) {
    say(error.message, true);
  }
}

by("tab-user").addEventListener("click", () => mode("user"));
by("tab-words").addEventListener("click", () => mode("words"));
by("user").addEventListener("change", (event) => begin({ user: event.target.value }));
by("panel-words").addEventListener("submit", (event) => {
  event.preventDefault();
  begin({ words: by("words").value.trim() });
});
by("words").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    by("panel-words").requestSubmit();
  }
});
by("again").addEventListener("click", () => begin({}));
by("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = by("key").value.trim();
  sessionStorage.setItem("key", key);
  by("key-form").hidden = true;
  say("");
  listUsers();
});

listUsers();
