// Keeps <main> as the service would answer it now. Without this script, a page is what it was when it was loaded.
"use strict";

const EVERY = 2000; // milliseconds
const button = document.getElementById("live");
let tag = null;
let paused = false;

const main = () => document.querySelector("main");
const isLive = () => main().hasAttribute("data-live");

function tell(state, words) {
  button.hidden = !isLive() && state === "live";
  button.dataset.state = state;
  button.textContent = words;
  button.setAttribute("aria-pressed", String(state === "paused"));
}

function reading() {
  const selection = document.getSelection();
  return selection && !selection.isCollapsed && main().contains(selection.anchorNode);
}

function replace(text) {
  const fresh = new DOMParser().parseFromString(text, "text/html").querySelector("main");
  const old = main();
  if (!fresh || fresh.innerHTML === old.innerHTML) return;
  for (const part of old.querySelectorAll("details[open][id]")) {
    const again = fresh.querySelector("#" + CSS.escape(part.id));
    if (again) again.open = true;
  }
  for (const row of fresh.querySelectorAll("[data-stage][id]")) {
    const before = old.querySelector("#" + CSS.escape(row.id));
    if (!before || before.dataset.stage !== row.dataset.stage) row.classList.add("changed");
  }
  const scrolled = [...old.querySelectorAll(".scroll[id]")].map((part) => [part.id, part.scrollLeft]);
  const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
  old.replaceWith(fresh);
  for (const [id, left] of scrolled) {
    const again = document.getElementById(id);
    if (again) again.scrollLeft = left;
  }
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

async function look() {
  if (!paused && !document.hidden && !reading()) {
    try {
      const answer = await fetch(location.href, { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.redirected) return location.reload();
      if (answer.ok) {
        tag = answer.headers.get("ETag");
        replace(await answer.text());
      }
      if (!answer.ok && answer.status !== 304) throw new Error(answer.statusText);
      if (!paused) tell("live", "Live");
    } catch {
      if (!paused) tell("away", "No answer");
    }
  }
  if (isLive()) setTimeout(look, EVERY);
}

if (button && isLive()) {
  button.addEventListener("click", () => {
    paused = !paused;
    tell(paused ? "paused" : "live", paused ? "Paused" : "Live");
  });
  tell("live", "Live");
  setTimeout(look, EVERY);
}
