"use strict";
// Asks for the page's version every two seconds and replaces what is inside <main> when it is new.
(() => {
  const PAUSE = 2000;
  const { base, version: first } = document.body.dataset;
  const main = document.querySelector("main");
  const said = document.getElementById("serve-said");
  let version = first;
  // The last trouble, which a good answer takes away again.
  let trouble = "";

  const say = (text) => {
    said.textContent = text;
  };

  const get = async (part) => {
    const answer = await fetch(`${base}/${part}`, { cache: "no-store" });
    const text = await answer.text();
    if (!answer.ok) throw new Error(text || `HTTP ${answer.status}`);
    return text;
  };

  // Puts new content in place and leaves the reader where he was: the scroll position, sliders,
  // opened details, the focus. A slider at its end follows the run.
  const replace = (html) => {
    const [x, y] = [scrollX, scrollY];
    const focus = document.activeElement?.id;
    const sliders = [...main.querySelectorAll("input[type=range][id]")].map((s) => {
      return { id: s.id, value: s.value, last: s.value === s.max };
    });
    const open = [...main.querySelectorAll("details[id][open]")].map((d) => d.id);
    // Pictures take their place a moment later; until then the page keeps its height.
    main.style.minHeight = `${main.offsetHeight}px`;
    setTimeout(() => (main.style.minHeight = ""), PAUSE / 2);
    main.innerHTML = html;
    // The report's own script takes hold of its new slider.
    window.showGrids?.();
    for (const { id, value, last } of sliders) {
      const slider = document.getElementById(id);
      if (!slider) continue;
      slider.value = last ? slider.max : value;
      slider.dispatchEvent(new Event("input", { bubbles: true }));
    }
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
    scrollTo(x, y);
  };

  const look = async () => {
    try {
      const now = await get("version");
      // A slider that is being moved is not taken out of the hand.
      if (now !== version && !main.querySelector("input[type=range]:active")) {
        replace(await get("main"));
        version = now;
      }
      if (trouble && said.textContent === trouble) say("");
      trouble = "";
    } catch (error) {
      trouble = error instanceof TypeError ? "The server does not answer." : error.message;
      say(trouble);
    }
  };

  const repeat = async () => {
    if (!document.hidden) await look();
    setTimeout(repeat, PAUSE);
  };

  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("button[data-ask]");
    if (!button) return;
    try {
      // The page's own policy, no-referrer, makes some browsers hide the origin of a POST.
      const how = { method: "POST", referrerPolicy: "same-origin" };
      const answer = await fetch(`${base}/${button.dataset.ask}`, how);
      say(await answer.text());
    } catch {
      say("The server does not answer.");
    }
  });

  setTimeout(repeat, PAUSE);
})();
