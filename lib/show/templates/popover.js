  // One panel, beside what it is about, or at the foot of a narrow screen. Escape and a click
  // elsewhere close it. Null where the browser has no popovers.
  var panel = (function () {
    var box = document.createElement("div"), close = document.createElement("button");
    if (!box.showPopover) { return null; }
    box.className = "about";
    box.tabIndex = -1;
    box.setAttribute("popover", "auto");
    box.setAttribute("role", "dialog");
    box.setAttribute("aria-label", "What this rests on");
    close.type = "button";
    close.textContent = "Close";
    close.addEventListener("click", function () { box.hidePopover(); });
    document.body.appendChild(box);
    return {
      close: function () { box.hidePopover(); },
      open: function (control, label, parts) {
        var place = control.getBoundingClientRect(), root = document.documentElement;
        box.setAttribute("aria-label", label);
        box.replaceChildren.apply(box, parts.concat(close));
        box.showPopover();
        if (window.matchMedia("(min-width: 40.01rem)").matches) {
          var left = Math.min(place.left, root.clientWidth - box.offsetWidth - 8);
          box.style.left = Math.max(8, left) + window.scrollX + "px";
          box.style.top = place.bottom + 6 + window.scrollY + "px";
        } else { box.style.left = box.style.top = ""; }
        box.focus();
      },
    };
  })();
